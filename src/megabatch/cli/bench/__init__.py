"""The verbs of `megabatch bench`."""
