"""Augmentation seeded per sample."""
