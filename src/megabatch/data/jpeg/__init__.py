"""JPEG decoding at the crop, on CPU threads or a GPU."""
