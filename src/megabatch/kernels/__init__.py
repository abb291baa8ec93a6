"""Fused kernels: Triton on a GPU, C on a CPU, each beside a plain PyTorch reference."""
