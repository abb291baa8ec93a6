"""Images from files, shards or memory to augmented batches, in an exact order; each part works in any PyTorch script.

Names are imported when first used. Modules of megabatch import one another directly, not through this page.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megabatch.data.arrays import ArraySource
    from megabatch.data.batch import Batch
    from megabatch.data.eval_loader import EvalLoader
    from megabatch.data.fetch import Fetched
    from megabatch.data.folder import FolderSource, open_folder
    from megabatch.data.loader import TrainLoader
    from megabatch.data.order import permute, stream_samples
    from megabatch.data.parquet import ParquetSource, open_parquet
    from megabatch.data.remote_shards import RemoteShards, open_remote_shards
    from megabatch.data.shards import ShardSource, open_shards
    from megabatch.data.source import EncodedSource
    from megabatch.data.split import check_split, micro_batches

_HOMES = {
    "ArraySource": "arrays",
    "Batch": "batch",
    "EncodedSource": "source",
    "EvalLoader": "eval_loader",
    "Fetched": "fetch",
    "FolderSource": "folder",
    "ParquetSource": "parquet",
    "RemoteShards": "remote_shards",
    "ShardSource": "shards",
    "TrainLoader": "loader",
    "check_split": "split",
    "micro_batches": "split",
    "open_folder": "folder",
    "open_parquet": "parquet",
    "open_remote_shards": "remote_shards",
    "open_shards": "shards",
    "permute": "order",
    "stream_samples": "order",
}

__all__ = [
    "ArraySource",
    "Batch",
    "EncodedSource",
    "EvalLoader",
    "Fetched",
    "FolderSource",
    "ParquetSource",
    "RemoteShards",
    "ShardSource",
    "TrainLoader",
    "check_split",
    "micro_batches",
    "open_folder",
    "open_parquet",
    "open_remote_shards",
    "open_shards",
    "permute",
    "stream_samples",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
