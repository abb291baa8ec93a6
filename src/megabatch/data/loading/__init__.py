"""Data loaders, and the deterministic order in which they read samples."""
