"""Conversion of a data set to indexed tar shards."""
