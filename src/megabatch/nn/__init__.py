"""Models, batch norm over a span of samples, initialisation and loss."""

from megabatch import _names_of

__getattr__ = _names_of(__name__)  # `from megabatch.nn import NAME` works for the public names of this package
