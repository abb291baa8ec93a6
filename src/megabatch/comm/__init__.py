"""Communication between workers: their start, all-reduce algorithms as DDP hooks, failure detection."""

from megabatch import _names_of

__getattr__ = _names_of(__name__)  # `from megabatch.comm import NAME` works for the public names of this package
