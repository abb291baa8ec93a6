"""All-reduce of gradients on a grid of ranks; `wrap` is the entry point."""
