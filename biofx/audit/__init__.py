"""Does a model still hold what its mechanisms promise? ``biofx.check``, one file a family of invariants."""
