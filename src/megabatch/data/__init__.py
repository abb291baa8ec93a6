"""Input pipeline: sources, exact sample order, JPEG decoding, augmentation, loaders."""
