"""Teaches a model that does not search yet how to: `make_traces`, then `warm_start`."""
