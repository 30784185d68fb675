"""The Tidegate server: sockets in, tensors through, answers out."""

__version__ = "0.1.0"

__all__ = ["__version__"]
