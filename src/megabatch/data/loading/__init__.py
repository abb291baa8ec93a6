"""Loaders, and the exact order in which they read samples."""
