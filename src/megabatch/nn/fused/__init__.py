"""Blocks computed by fused kernels."""
