"""Downloads known data sets and verifies their checksums."""
