"""Choices of a run by measurement: precision, memory layout and kernels, micro-batch; kept with the run."""
