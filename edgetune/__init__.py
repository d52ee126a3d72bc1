"""edgetune: take a Phi-3 model to an edge device and let it learn there."""

__version__ = "0.1.0"
