"""Input pipeline: sources, exact sample order, JPEG decoding, augmentation, loaders."""

from megabatch import _names_of

__getattr__ = _names_of(__name__)  # `from megabatch.data import NAME` works for the public names of this package
