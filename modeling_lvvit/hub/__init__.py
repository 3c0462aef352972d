"""Uploads to the Hugging Face Hub: rights, checked files, finished folders."""
