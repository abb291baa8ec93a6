"""Rows of the reference-convergence table of MLPerf Training, one module per submitter."""
