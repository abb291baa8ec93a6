"""Former name of `megabatch.files`, for scripts that import `cache_folder` from here."""

from megabatch.files import cache_folder

__all__ = ["cache_folder"]
