"""Images with several classes, or none: labels that are lists."""
