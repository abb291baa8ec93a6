"""Prediction of step time, efficiency, time to train and cost of a recipe on a cluster. Imports no torch."""

CHANGES = "bandwidth=2, latency=0.5, batch=0.5 (factors), wire=fp32, all-reduce=flat, bucket=4, shape=8x16, overlap=no"
"""Changes that `plan.what_if` knows, for help texts."""
