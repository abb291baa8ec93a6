"""Batch norm whose statistics cover a span of samples, and its evaluation statistics."""
