"""Former name of `megabatch.data.sources.parquet`, for scripts that import from here."""

from megabatch.data.sources.dataset import open_parquet
from megabatch.data.sources.parquet import ParquetSource

__all__ = ["ParquetSource", "open_parquet"]
