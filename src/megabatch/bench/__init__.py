"""Benchmarks of single parts of training on this machine, used by `megabatch bench`."""
