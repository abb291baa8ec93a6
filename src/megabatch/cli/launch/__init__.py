"""The verbs of `megabatch launch`."""
