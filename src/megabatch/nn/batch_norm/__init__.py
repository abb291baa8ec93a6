"""Batch norm over a span of samples, and its evaluation statistics."""
