"""Observing runs: event log, progress display, run folders and HTML reports."""
