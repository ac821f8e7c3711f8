"""A warning for a model whose learning-rate factors an optimizer erases, because nothing is attached to it.

Factors act in the graph, on gradients, and an optimizer whose steps do not depend on the scale of gradients
(of the Adam kind) divides them out again. :func:`biofx.attach` scales its updates instead.

torch calls one hook before the step of any optimizer. It looks for weights of models that were transformed
and not stepped since; each is looked at once, when an optimizer steps it for the first time. Without such
weights it returns at once. What it cannot see: copies of a model, parameters that took the place of the
model's own (``fully_shard``, ``load_state_dict(assign=True)``), and optimizers that run no step hooks.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from biofx.errors import BiofxWarning
from biofx.plasticity.attachment import attachments_of
from biofx.plasticity.binding import erases_factors, is_attached
from biofx.plasticity.model_states import bio_modules


class _Watched:
    """One model."""

    is_warned = False


_WATCHED: Any = WeakIdKeyDictionary()  # of each weight that no optimizer has stepped yet, its model
_SEEN: Any = weakref.WeakKeyDictionary()  # of each optimizer that has none of these, its number of parameters
_HOOKS: list[Any] = []


def watch_first_step(model: nn.Module) -> None:
    """Warn, once, if the first step of a model is that of an optimizer that erases its factors.

    Args:
        model: transformed; one without factors in its graph is not watched.
    """
    watched = _Watched()
    for state in bio_modules(model).values():
        weight = state.parameter
        is_scaled = (state.scaled_in_graph and state.has_rates) or state.gradient_level != 1
        if weight is not None and is_scaled:
            _WATCHED[weight] = watched
    _SEEN.clear()
    if len(_WATCHED) and not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not len(_WATCHED):
        return
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    if _SEEN.get(optimizer) == count:
        return
    for group in optimizer.param_groups:
        found = [parameter for parameter in group["params"] if parameter in _WATCHED]
        models = {
            _WATCHED.pop(parameter) for parameter in found
        }  # before a trial steps, which comes here too
        if not found or any(model.is_warned for model in models):
            continue
        if attachments_of(optimizer) or any(map(is_attached, found)):  # which binds groups added since
            continue
        if erases_factors(optimizer, group, found):
            for model in models:
                model.is_warned = True
            _warn(optimizer)
    _SEEN[optimizer] = count


def _warn(optimizer: Optimizer) -> None:
    warnings.warn(
        f"{type(optimizer).__name__} steps a model whose learning-rate factors scale gradients in its graph, "
        "and its steps do not follow the scale of gradients: the factors have no effect. Let "
        "biofx.attach(bio_model, optimizer) scale the updates, or transform without factors "
        "(fuzzy_lr_distribution='baseline')",
        BiofxWarning,
        stacklevel=4,
    )
