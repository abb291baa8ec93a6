"""Batch norm fused with residual add, ReLU and pooling."""
