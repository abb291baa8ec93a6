"""Measurements of training: phases of a step, norms of layers, traces."""
