"""Any image classifier: load it, find its features, give it a patch head, fit it to another input size."""
