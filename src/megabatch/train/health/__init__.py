"""Faults of a running job: unreadable samples, non-finite values, and workers that are slow or differ."""
