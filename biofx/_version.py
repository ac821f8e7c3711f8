"""The version of biofx, which records and files name."""

__version__ = "0.1.0"
