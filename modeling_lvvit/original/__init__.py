"""The authors' code: read its checkpoints, convert them, compare with it."""
