"""Measurements of one part of training on this machine, behind `megabatch bench`."""
