"""Back to plain PyTorch."""
