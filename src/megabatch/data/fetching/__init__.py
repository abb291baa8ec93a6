"""Download of known data sets, with verified checksums."""
