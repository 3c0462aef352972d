"""A page on which a model is tried with one's own images."""
