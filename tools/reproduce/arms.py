"""The arms: each mechanism, and the control that differs from it in nothing but the mechanism."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

import biofx
from biofx.plasticity.optimizer_step import LayerStep, Observer

_OFF = biofx.BioConfig(fuzzy_lr_distribution=biofx.Distribution.BASELINE)
_RATES = biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.5)
_DALE = _OFF.replace(apply_dales_principle=True)


@dataclass(frozen=True)
class Arm:
    """One way to train a network."""

    config: biofx.BioConfig | None = None
    """What the network is transformed with; None for the network as it is."""
    rules: tuple[biofx.Rule, ...] = ()
    levelled: bool = False
    """Whether the synapses of a layer share the mean of the factors that config and rules give them."""
    freed: bool = False
    """Whether the transformed network's initial weights go back into the plain network, which then learns."""


@dataclass(frozen=True)
class Mechanism:
    """Names of the two arms that are compared, and what they have in common."""

    arm: str
    control: str
    common: str


_CRYSTALLIZE = (biofx.Rule("crystallize", every=5),)
_TURNOVER = (biofx.Rule("rejuvenate_weights", every=20),)
ARMS = {
    "plain": Arm(),
    "fuzzy rates": Arm(_RATES),
    "mean rates": Arm(_RATES, levelled=True),
    "crystallizing": Arm(_OFF, _CRYSTALLIZE),
    "crystallizing mean": Arm(_OFF, _CRYSTALLIZE, levelled=True),
    "volume": Arm(_OFF.replace(base_lr=None), (biofx.Rule("volume_dependent_lr"),)),
    "turnover": Arm(_OFF.replace(rejuvenation_turnover=0.01), _TURNOVER),
    "split in 2": Arm(_OFF.replace(weight_splitting_Gamma=2)),
    "Dale": Arm(_DALE),
    "sign-free": Arm(_DALE, freed=True),
}
MECHANISMS = {
    "rates": Mechanism("fuzzy rates", "mean rates", "each layer's mean rate"),
    "crystallization": Mechanism(
        "crystallizing", "crystallizing mean", "the rule by which each layer's mean rate falls"
    ),
    "volume": Mechanism("volume", "plain", "each layer's mean rate, 1 at every step"),
    "turnover": Mechanism(
        "turnover", "plain", "initial weights and rates; nothing is replaced in the control"
    ),
    "splitting": Mechanism("split in 2", "plain", "number of parameters, initial weights"),
    "dale": Mechanism("Dale", "sign-free", "initial weights: sparse, signed, balanced"),
}


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
