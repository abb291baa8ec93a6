"""Communication between workers: their start, all-reduce algorithms as DDP hooks, failure detection."""
