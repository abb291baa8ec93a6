"""Image classifiers trained to full accuracy with extremely large minibatches, as fast as the hardware allows."""

__version__ = "0.1.0"
