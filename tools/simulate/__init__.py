"""Memory and traffic of a training step on ranks, from formulas: ``python tools/simulate``."""
