"""The mechanisms: a config that switches one on, and what it is by definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from biofx.plasticity.model_states import bio_module_path, bio_modules
from durability.arriving import Named, loss_of


def pooled(y: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Each channel replaced by the sum over its pair."""
    pairs = activation(y).reshape(len(y), -1, 2).sum(2)
    return torch.stack([pairs, pairs], 2).reshape(y.shape)


def summed(y: Tensor) -> Tensor:
    """Each channel replaced by the sum over its pair, without an activation."""
    return pooled(y, lambda z: z)


def net(p: Mapping[str, Tensor], x: Tensor, between: Callable[[Tensor], Tensor]) -> Tensor:
    """The plain network, with something behind its hidden layers."""
    y = F.relu(between(F.linear(x, p["0.weight"], p["0.bias"])))
    y = F.relu(between(F.linear(y, p["2.weight"], p["2.bias"])))
    return F.linear(y, p["4.weight"], p["4.bias"])


Forward = Callable[[Mapping[str, Tensor], Tensor, Callable[[Tensor], Tensor]], Tensor]
"""A network by hand: its parameters, an input, and what stands behind its hidden layers."""


def signs_of(bio_model: nn.Module) -> Named:
    """The sign of each weight's unit, laid out like the weight; 0 where free."""
    return {
        path: torch.zeros(()) if state.signs() is None else state.signs()
        for path, state in bio_modules(bio_model).items()
    }


def masks_of(bio_model: nn.Module) -> Named:
    """The mask of each weight: 1 where a connection exists."""
    states = bio_modules(bio_model).items()
    masks = {path: state.connection_mask for path, state in states}
    return {path: torch.ones(()) if mask is None else mask for path, mask in masks.items()}


def without_missing(weight: Tensor, mask: Tensor) -> Tensor:
    """A weight, or its gradient, with 0 where no connection exists."""
    return torch.where(mask == 1, weight, torch.zeros_like(weight))


def projected(weight: Tensor, sign: Tensor) -> Tensor:
    """A weight with the wrong signs set to 0."""
    return torch.where(weight * sign < 0, torch.zeros_like(weight), weight)


def mirrored(weight: Tensor, sign: Tensor) -> Tensor:
    """A weight with the wrong signs turned round."""
    return torch.where(sign == 0, weight, weight.abs() * sign)


def outward(weight: Tensor, gradient: Tensor, sign: Tensor) -> Tensor:
    """The gradient of projected descent: nothing drives a weight further out."""
    return torch.where((weight * sign <= 0) & (gradient * sign > 0), torch.zeros_like(gradient), gradient)


@dataclass(frozen=True)
class Mechanism:
    """One mechanism by itself: the config that switches it on, and what it is by definition."""

    config: dict[str, Any]
    between: Callable[[Tensor], Tensor] = lambda y: y
    weight: Callable[[Tensor, Tensor], Tensor] = lambda w, sign: w
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda w, g, sign: g
    scaled: bool = False
    each: Callable[[nn.Module], Named] = signs_of
    """What weights and gradients depend on, laid out like them, by path."""
    adds_up: bool = False
    """Whether weights are sums of sub-weights."""

    def output(self, bio_model: nn.Module, x: Tensor, forward: Forward = net) -> Tensor:
        """Return the output by definition."""
        return self._run(bio_model, x, forward)[0].detach()

    def gradients(self, bio_model: nn.Module, x: Tensor, forward: Forward = net) -> Named:
        """Return the gradients by definition."""
        output, effective, raw = self._run(bio_model, x, forward)
        names = list(effective)
        found = torch.autograd.grad(loss_of(output), [effective[name] for name in names])
        signs, result = self.each(bio_model), dict(zip(names, found, strict=True))
        for name, sign in signs.items():
            result[name] = self.gradient(raw[name], result[name], sign)
            if self.scaled:
                state: Any = bio_model.get_submodule(bio_module_path(name))
                result[name] = result[name] * state.fuzzy_learning_rate_parameters
        return result

    def effective(self, bio_model: nn.Module) -> Named:
        """Return the parameters as the mechanism has them used."""
        effective = self._run(bio_model, torch.zeros(1, 4), net)[1]
        return {name: value.detach() for name, value in self._whole(effective).items()}

    def _run(self, bio_model: nn.Module, x: Tensor, forward: Forward) -> tuple[Tensor, Named, Named]:
        raw = {name: parameter.detach() for name, parameter in bio_model.named_parameters()}
        signs = self.each(bio_model)
        effective = {
            name: (self.weight(value, signs[name]) if name in signs else value).clone().requires_grad_()
            for name, value in raw.items()
        }
        return forward(self._whole(effective), x, self.between), effective, raw

    def _whole(self, effective: Named) -> Named:
        """Return the parameters of the plain network; sums, where they are several for each connection."""
        whole = {name: value for name, value in effective.items() if "bio_mod" not in name}
        for name, value in effective.items():
            if self.adds_up and "sub_weight_" in name:
                layer = name.partition(".")[0]
                whole[f"{layer}.weight"] = whole[f"{layer}.weight"] + value
        return whole


OFF: dict[str, Any] = {"fuzzy_lr_distribution": "baseline"}
DALE: dict[str, Any] = {**OFF, "apply_dales_principle": True, "dales_constrain_readout": True}
MECHANISMS = {
    "split": Mechanism({**OFF, "weight_splitting_Gamma": 2}, between=summed),
    "split, tanh": Mechanism(
        {**OFF, "weight_splitting_Gamma": 2, "weight_splitting_activation_function": torch.tanh},
        between=lambda y: pooled(y, torch.tanh),
    ),
    "sub-weights": Mechanism(
        {
            "weight_splitting_Gamma": 3,
            "weight_splitting_mode": "sub-weights",
            "fuzzy_learning_rate_factor_nu": 0.4,
        },
        scaled=True,
        adds_up=True,
    ),
    "signs": Mechanism(DALE, weight=projected, gradient=outward),
    "signs, abs": Mechanism(
        {**DALE, "dales_method": "abs"},
        weight=mirrored,
        gradient=lambda w, g, sign: torch.where(sign == 0, g, g * sign * w.sign()),
    ),
    "signs, expand": Mechanism({**DALE, "dales_method": "expand"}, weight=projected, gradient=outward),
    "factors": Mechanism({"fuzzy_learning_rate_factor_nu": 0.4}, scaled=True),
    "from seed": Mechanism({"fuzzy_learning_rate_factor_nu": 0.4, "fuzzy_lr_dtype": "seed"}, scaled=True),
    "masks": Mechanism(
        {**OFF, "weight_density": 0.5},
        weight=without_missing,
        gradient=lambda w, g, mask: without_missing(g, mask),
        each=masks_of,
    ),
    "activity": Mechanism({"fuzzy_lr_distribution": "activity", "fuzzy_lr_dynamic": True}),
    "rules": Mechanism({"weight_splitting_Gamma": 2, "apply_dales_principle": True}),
    "turnover": Mechanism({"weight_density": 0.5}, weight=without_missing, each=masks_of),
}
