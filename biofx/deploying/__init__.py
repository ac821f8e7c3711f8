"""Back to a plain PyTorch model: ``biofx.deploy``."""
