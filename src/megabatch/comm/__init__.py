"""Gradient exchange between workers: starting them, all-reduce algorithms as DDP hooks, failure detection."""
