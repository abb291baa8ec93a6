"""Shared machinery of the optimizers: choosing the kernel, foreach or reference backend of a step."""
