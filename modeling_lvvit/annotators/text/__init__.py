"""Image-text models as annotators: prompts made of class names score every cell."""
