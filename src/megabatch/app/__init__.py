"""Wires a recipe and a runtime into one run: the only package that knows every component."""
