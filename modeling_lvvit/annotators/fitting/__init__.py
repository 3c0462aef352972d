"""Annotators from labels alone: a head fitted on the features of a frozen backbone."""
