"""Which pass did it: ``biofx.bisect``, and the reproducers of passes that fail."""
