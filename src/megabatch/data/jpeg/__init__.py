"""JPEG decoding of crops, on CPU threads or a GPU."""
