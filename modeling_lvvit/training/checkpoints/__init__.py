"""Checkpoints: which are whole, which a run can go on from, and where it may write."""
