"""Classifiers and image-text models that make dense labels, stored or online."""
