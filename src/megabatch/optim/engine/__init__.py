"""Shared machinery of the optimizers: dispatch to a kernel, foreach or reference step."""
