"""Dense labels: format, storage, reading, and crops to sparse targets."""
