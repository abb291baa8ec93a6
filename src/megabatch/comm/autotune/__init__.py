"""Choice of the all-reduce algorithm for `--all-reduce auto`, and the measurements it is based on."""
