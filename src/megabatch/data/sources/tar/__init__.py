"""Tar files: indexed shards, and folders in a tar."""
