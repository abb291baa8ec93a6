"""Prediction of step time, efficiency, time to train and cost of a recipe on a cluster. Imports no torch."""
