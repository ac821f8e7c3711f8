"""Putting a model into training or evaluation, by whatever its class has for that."""

from __future__ import annotations

from torch import nn


def switch_mode(model: nn.Module, training: bool) -> nn.Module:
    """Put a model into a mode as its user would, with its own ``train()`` and ``eval()``; return it.

    Where those fail, the flags of all its modules are set and nothing else.
    """
    try:
        model.train() if training else model.eval()
    except Exception:
        for module in model.modules():
            module.training = training
    return model


def has_own_switch(model: nn.Module) -> bool:
    """Whether a module of a model does something of its own when it is switched."""
    return any(
        type(module).train is not nn.Module.train
        or type(module).eval is not nn.Module.eval
        or not vars(module).keys().isdisjoint(("train", "eval"))
        for module in model.modules()
    )
