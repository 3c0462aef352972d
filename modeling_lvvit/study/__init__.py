"""Studies: the same training in several ways, over several seeds."""
