"""The version of biofx, which records and files name."""

__version__ = "0.2.0"
