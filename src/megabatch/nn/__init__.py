"""Models, batch norm with a span, initialisation and loss."""
