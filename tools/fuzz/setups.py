"""Which model, transformed in which way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

import biofx
from biofx.plasticity.model_states import bio_modules
from fuzz.model_kinds import MODELS
from fuzz.random_models import random_model

OFF: dict[str, Any] = {"fuzzy_lr_distribution": "baseline"}
KEEP: dict[str, Any] = {"apply_dales_principle": True, "dales_initialisation": "keep"}
SPLIT: dict[str, Any] = {"weight_splitting_Gamma": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "off": OFF,
    "rates of 1": {"fuzzy_learning_rate_factor_nu": 0.4},
    "rates": {"fuzzy_learning_rate_factor_nu": 0.4},
    "rates of all": {"fuzzy_learning_rate_factor_nu": 0.4, "fuzzy_lr_parameters": "all"},
    "rates from their seed": {"fuzzy_learning_rate_factor_nu": 0.4, "fuzzy_lr_dtype": "seed"},
    "signs": {**OFF, **KEEP},
    "signs, mirrored": {**OFF, **KEEP, "dales_method": "abs"},
    "split": {**OFF, **SPLIT},
    "split, not folded": {**OFF, **SPLIT, "weight_splitting_fold": False},
    "split, tanh": {**OFF, **SPLIT, "weight_splitting_activation_function": "torch.tanh"},
    "masked": {**OFF, "weight_density": 0.5},
    "sub-weights": {**OFF, **SPLIT, "weight_splitting_mode": "sub-weights"},
    "sub-weights, all": {**KEEP, **SPLIT, "weight_splitting_mode": "sub-weights"},
    "all": {**KEEP, **SPLIT, "fuzzy_learning_rate_factor_nu": 0.4},
    "all, masked": {**KEEP, **SPLIT, "fuzzy_learning_rate_factor_nu": 0.4, "weight_density": 0.5},
}
KEEP_THE_FUNCTION = ("off", "rates of 1", "rates", "rates of all", "rates from their seed")


@dataclass(frozen=True)
class Setup:
    """Which model, transformed in which way."""

    seed: int
    kind: str
    config: str
    mode: str = "train"
    recorded: bool = False
    shared: bool = False

    def model(self) -> tuple[nn.Module, Callable[[int], Tensor]]:
        """Make the model, and what gives batches of it."""
        torch.manual_seed(self.seed)
        if self.kind == "random":
            model, shape = random_model(Random(self.seed).choice)
            return model.train(self.mode == "train"), lambda samples: torch.randn(samples, *shape)
        kind = MODELS[self.kind]
        return kind.make().train(self.mode == "train"), kind.inputs

    def transform(self, model: nn.Module, x: Tensor) -> Any:
        """Transform a model."""
        examples: Any = ((x,), {}) if self.recorded else None
        made = biofx.transform(
            model, CONFIGS[self.config], example_inputs=examples, share_parameters=self.shared
        )
        if self.config == "rates of 1":  # which change nothing, through everything that rates need
            for rates in factors(made.graph_module).values():
                rates.fill_(1)
        return made.graph_module


def factors(model: nn.Module) -> dict[str, Tensor]:
    """The learning-rate factors by the name of their parameter, where that is one and not computed."""
    states = {path: state for path, state in bio_modules(model).items() if state.parameter is not None}
    found = {path: state.fuzzy_learning_rate_parameters for path, state in states.items()}
    return {path: factors for path, factors in found.items() if factors is not None}


def acting_factors(model: nn.Module) -> dict[str, Tensor]:
    """The same, dampened where synapses have crystallized, as they act in a step of what is attached."""
    states = {path: state for path, state in bio_modules(model).items() if state.parameter is not None}
    found = {path: state.acting_factors for path, state in states.items()}
    return {path: factors for path, factors in found.items() if factors is not None}


def is_computed(name: str) -> bool:
    """Whether a parameter is one of those that a parametrization computes another from."""
    return "parametrizations" in name or name.endswith(("_orig", "_g", "_v"))


def without_definition(model: nn.Module) -> set[str]:
    """Names of parameters whose factor is a matter of opinion.

    They were several when they got their factors and are tied now, or their layer sits somewhere else now.
    """
    states = [state for state in model.modules() if isinstance(state, biofx.BioModule) and state.is_linked]
    paths: dict[int, set[str]] = {}
    for state in states:
        if state.parameter is not None:
            paths.setdefault(id(state.parameter), set()).add(state.path)
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, each in named if len({name, *paths.get(id(each), ())}) > 1}
