"""Optimizers, schedules and batch-size control for large minibatches."""

from megabatch import _names_of

__getattr__ = _names_of(__name__)  # `from megabatch.optim import NAME` works for the public names of this package
