"""Optimizers, schedules and batch-size control for large minibatches."""
