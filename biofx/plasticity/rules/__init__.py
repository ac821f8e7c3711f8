"""Plasticity rules as functions of tensors: they know nothing of models, layers or optimizers."""
