"""1x1 convolutions fused with the batch norms around them."""
