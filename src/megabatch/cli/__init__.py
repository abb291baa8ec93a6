"""The command line: one thin file per verb. Exit code 0 done, 2 the user's mistake, 1 anything else."""
