"""Saving a model with how it was made, and making it again: ``biofx.save`` and ``biofx.load``."""
