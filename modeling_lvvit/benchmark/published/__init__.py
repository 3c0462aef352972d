"""The comparison of the paper: what was published, and what is counted and timed here next to it."""
