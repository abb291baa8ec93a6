"""Where megabatch keeps what it may fetch or measure again: data sets, shards, tuning tables."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/megabatch, by default ~/.cache/megabatch."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "megabatch"
