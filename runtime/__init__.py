"""Bundle to tokens."""

__version__ = "0.1.0"
