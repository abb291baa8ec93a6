"""Choice of the all-reduce algorithm for `--all-reduce auto`, from measurements or a cost model."""
