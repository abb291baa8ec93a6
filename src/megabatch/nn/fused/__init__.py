"""Fused forwards of the models in `megabatch.nn`, which `fuse.set_fusion` puts in and takes out again."""
