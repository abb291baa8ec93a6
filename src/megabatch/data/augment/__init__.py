"""Augmentation with random numbers seeded per sample."""
