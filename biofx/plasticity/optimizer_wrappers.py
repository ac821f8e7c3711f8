"""Optimizers around other optimizers: trainers' wrappers, and those that change weights themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from biofx.errors import PlasticityError

_INSIDE = ("optimizer", "_optimizer", "base_optimizer", "_base_optimizer", "inner_optimizer", "optim")
_LOOKED_THROUGH = frozenset(
    {
        *(("accelerate", "AcceleratedOptimizer"), ("pytorch_optimizer", "Lookahead")),
        *(("lightning", "LightningOptimizer"), ("lightning", "_FabricOptimizer")),
        *(("pytorch_lightning", "LightningOptimizer"), ("lightning_fabric", "_FabricOptimizer")),
        *(("torch_optimizer", "Lookahead"), ("timm", "Lookahead")),
    }
)
"""Package and name of wrappers that leave it to the optimizer inside to change weights.

Lookahead interpolates between weights that it has seen, which are in proportion to the factors if steps are.
"""


def stepping_optimizer(optimizer: Any, weights: Iterable[Tensor]) -> Optimizer:
    """Return the optimizer whose steps change weights: the one that is given, or one that it wraps.

    Args:
        optimizer: what the training loop steps.
        weights: the model's.

    Raises:
        PlasticityError: it is none; or a wrapper whose own steps change weights, or may.
    """
    known = {id(weight) for weight in weights}
    while True:
        inside = inner_optimizer(optimizer)
        names = {(cls.__module__.partition(".")[0], cls.__name__) for cls in type(optimizer).__mro__}
        if inside is not None and names & _LOOKED_THROUGH:
            optimizer = inside[1]
            continue
        if isinstance(optimizer, Optimizer) and "_optimizer_step_pre_hooks" in vars(optimizer):
            if _is_spread(optimizer):
                raise PlasticityError(
                    f"{type(optimizer).__name__} steps some of the weights on each rank and copies them to "
                    "the others; use the optimizer that it wraps, with DistributedDataParallel or fully_shard"
                )
            return optimizer
        name = type(optimizer).__name__
        if inside is None:
            raise PlasticityError(
                "expected an optimizer of torch.optim's kind, found "
                f"{_told(optimizer)}; attach to the optimizer that steps the weights"
            )
        held = {id(weight) for group in inside[1].param_groups for weight in group["params"]}
        if held & known:
            raise PlasticityError(
                f"expected the optimizer that steps the weights, found a {name} around it; attach to "
                f"optimizer.{inside[0]}, the {type(inside[1]).__name__} inside it, if that alone changes "
                "weights"
            )
        raise PlasticityError(
            f"{name} wraps a {type(inside[1]).__name__} of weights that are not the model's: it trains "
            "copies, which factors cannot reach; attach to an optimizer of bio_model.parameters()"
        )


def inner_optimizer(optimizer: Any) -> tuple[str, Optimizer] | None:
    """Return the name of the attribute in which an object has another optimizer, and that optimizer."""
    found = getattr(optimizer, "__dict__", {})
    for name in _INSIDE:
        inner: Any = found.get(name)
        if inner is not optimizer and (isinstance(inner, Optimizer) or hasattr(inner, "param_groups")):
            return name, inner
    return None


def _is_spread(optimizer: Any) -> bool:
    return any(cls.__name__ == "ZeroRedundancyOptimizer" for cls in type(optimizer).__mro__)


def _told(optimizer: Any) -> str:
    if callable(optimizer):
        return f"{getattr(optimizer, '__name__', optimizer)!r}, which has to be called first"
    return f"a {type(optimizer).__name__}"
