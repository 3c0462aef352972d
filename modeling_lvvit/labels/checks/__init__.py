"""Checks of dense labels: of a whole label set (`report`), and of its maps against the human labels of their images (`agreement`)."""
