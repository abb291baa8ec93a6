"""Optimizer steps as fused kernels, each beside a plain PyTorch reference."""
