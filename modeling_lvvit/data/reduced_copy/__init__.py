"""A copy of an image dataset with smaller images, which training decodes faster: `lvvit cache`."""
