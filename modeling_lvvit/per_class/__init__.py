"""What belongs to single classes: their weights in the loss, their scores, and how they are confused."""
