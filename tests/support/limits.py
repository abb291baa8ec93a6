"""Limits that end a test that hangs. A slow or loaded machine must never reach one: tests assert no times."""

HANG_S = 900.0
"""Seconds after which a subprocess, a rank or a collective counts as hanging; below pytest's own `timeout`."""
