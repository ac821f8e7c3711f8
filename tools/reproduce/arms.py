"""Networks of an arm: transformed, or the control that differs from it in nothing but a mechanism."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

import biofx
from biofx.plasticity.optimizer_step import LayerStep, Observer
from reproduce.experiment import Arm


def build(arm: Arm, make: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, list[Observer]]:
    """Return an arm's network and what watches it learn; equal seeds give paired initial weights.

    The global random state is as before.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain = make()
    if arm.config is None:
        return plain, []
    bio_model, _ = biofx.transform(plain, arm.config.replace(seed=seed))
    if arm.freed:
        plain.load_state_dict(biofx.checkpoints.plain_state(bio_model))
        return plain, []
    if not arm.levelled:
        return bio_model, []
    _level(bio_model)
    return bio_model, [_level_after_step]


def _level(bio_model: nn.Module) -> None:
    for module in bio_model.modules():
        if isinstance(module, biofx.BioModule):
            _level_factors(module)


def _level_after_step(step: int, layers: Mapping[str, LayerStep]) -> None:
    """Share what rules changed: an observer for ``biofx.attach``."""
    for layer in layers.values():
        _level_factors(layer.state)


def _level_factors(state: biofx.BioModule) -> None:
    for factors in (state.fuzzy_learning_rate_parameters, state.memory.dampening):
        if factors is not None:
            factors.fill_(factors.mean().item())
