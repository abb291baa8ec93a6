"""Models, batch norm over a span of samples, initialisation and loss."""
