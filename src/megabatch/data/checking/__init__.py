"""Search for corrupt and unusual files in a data set."""
