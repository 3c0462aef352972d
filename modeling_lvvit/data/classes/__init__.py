"""The label column: classes of images, one or several for each, and their names."""
