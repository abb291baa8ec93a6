"""Former name of `megabatch.data.jpeg.decode`, for scripts that import from here."""

from megabatch.data.jpeg.decode import decode, decode_crop

__all__ = ["decode", "decode_crop"]
