"""Data sets: arrays, image folders, tar shards (local or remote), parquet files."""
