"""Every mechanism through everything that happens to a model, measured."""
