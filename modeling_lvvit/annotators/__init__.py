"""Classifiers that make dense labels, stored or online."""
