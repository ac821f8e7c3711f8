"""Plasticity bound to an optimizer: what happens before and after each of its steps."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.errors import PlasticityError
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.exponentiated import exponentiate, refuse_decay
from biofx.plasticity.ranks import average_activity
from biofx.plasticity.rule_memory import memory_of, take_memory
from biofx.plasticity.scale_survival import keeps_gradient_factors
from biofx.plasticity.schedule import LayerStep, Observer, Rule, wants
from biofx.plasticity.sharded_state import shard_state, whole
from biofx.plasticity.shards import local, local_part, norm_of_part

_BEFORE_STEP = ("crystallize", "update_fuzzy_learning_rates")
_BUILT_IN = ("fuzzy_learning_rates", "volume_dependent_lr", *_BEFORE_STEP)
_ON_WEIGHTS = ("rejuvenate_weights", "synaptic_scaling")
_TAKEN: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()


@dataclass
class _Bound:
    """A weight that an optimizer steps."""

    state: BioModule
    weight: nn.Parameter
    scales_updates: bool
    group: dict[str, Any]
    old: Tensor | None = None
    multiplier: Tensor | None = None


class Attachment:
    """Plasticity bound to an optimizer; made by :func:`attach`."""

    def __init__(
        self,
        states: Mapping[str, BioModule],
        optimizer: Optimizer,
        rules: tuple[Rule, ...],
        decay: str,
        observers: tuple[Observer, ...],
        group: Any = None,
        *,
        exponentiated: bool = False,
    ) -> None:
        self.steps = 0
        """Optimizer steps so far, a count."""
        self.left_alone: dict[str, str] = {}
        """Weights that this attachment does not act on, with the reason, by path."""
        self.rules = rules
        self._decay = decay
        self._group = group
        self._exponentiated = exponentiated
        self._observers = list(observers)
        self._bound = self._bind(states, optimizer)
        self._check_rules()
        self._layers: dict[str, LayerStep] = {}
        self._skips = False
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._optimizer = optimizer
        _TAKEN.update({id(bound.weight): self for bound in self._bound.values()})

    @property
    def modes(self) -> dict[str, str]:
        """What factors multiply, ``"gradient"`` or ``"update"``, by the weight's path."""
        return {path: "update" if bound.scales_updates else "gradient" for path, bound in self._bound.items()}

    def detach(self) -> None:
        """Let the optimizer step as if nothing had been attached; weights and factors stay as they are."""
        for hook in self._hooks:
            hook.remove()
        for bound in self._bound.values():
            _TAKEN.pop(id(bound.weight), None)
        self._hooks, self._bound = [], {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs to go on, besides the state dicts of model and optimizer."""
        return {
            "version": 1,
            "steps": self.steps,
            "rules": [asdict(rule) for rule in self.rules],
            "memory": memory_of({path: bound.state for path, bound in self._bound.items()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another attachment stopped.

        Raises:
            PlasticityError: it is of another version, or ran another schedule; nothing has been changed.
        """
        if state.get("version") != 1:
            found = state.get("version")
            raise PlasticityError(f"expected the state of an attachment, version 1, found version {found!r}")
        rules = tuple(Rule(**entry) for entry in state["rules"])
        if rules != self.rules:
            raise PlasticityError(
                f"expected a state of the same schedule, {list(self.rules)}, found {list(rules)}"
            )
        take_memory({path: bound.state for path, bound in self._bound.items()}, state.get("memory", {}))
        self.steps = int(state["steps"])

    def _bind(self, states: Mapping[str, BioModule], optimizer: Optimizer) -> dict[str, _Bound]:
        group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        survives: dict[str, bool] = {}
        bound: dict[str, _Bound] = {}
        for path, state in states.items():
            weight = state.parameter
            group = group_of.get(id(weight))
            if weight is None:
                self.left_alone[path] = "it is computed by a parametrization"
            elif group is None:
                self.left_alone[path] = "the optimizer does not hold it"
            elif not weight.requires_grad:
                self.left_alone[path] = "it is frozen"
            elif id(weight) in _TAKEN:
                raise PlasticityError(
                    f"{path!r} is attached to an optimizer already; detach() that one first"
                )
            else:
                options = repr({name: value for name, value in group.items() if name != "params"})
                if options not in survives:
                    survives[options] = keeps_gradient_factors(optimizer, group)
                if self._decay == "free":
                    _decoupled_decay(optimizer, group)
                if self._exponentiated and state.is_constrained:
                    refuse_decay(path, group)
                decays = bool(group.get("weight_decay"))
                bound[path] = _Bound(state, weight, not survives[options] or decays, group)
        if not bound:
            raise PlasticityError(
                f"expected an optimizer of this model's weights, found a {type(optimizer).__name__} that "
                "holds none of them; build it from bio_model.parameters()"
            )
        return bound

    def _check_rules(self) -> None:
        """Refuse a rule that no bound layer will ever follow."""
        for name in dict.fromkeys(rule.name for rule in self.rules):
            if name == "crystallize":  # it dampens factors; where all are 1, there may be none yet
                for bound in self._bound.values():
                    bound.state.provide_factors()
                    shard_state(bound.state)
            reasons = {path: bound.state.why_never(name) for path, bound in self._bound.items()}
            if all(reason is not None for reason in reasons.values()):
                told = "; ".join(f"{path}: {reason}" for path, reason in reasons.items())
                raise PlasticityError(f"schedule: {name} has nothing to act on ({told})")

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        arguments = list(args[1:] if args and args[0] is optimizer else args)
        closure = arguments[0] if arguments else kwargs.get("closure")
        self._layers, self._skips = {}, _will_be_skipped(optimizer)
        if self._skips:
            return None
        if closure is None:
            self._prepare()
            return None

        def closure_then_rules() -> Any:
            result = closure()
            self._prepare()
            return result

        rest = args[:1] if args and args[0] is optimizer else ()
        return rest, {**kwargs, "closure": closure_then_rules}

    @torch.no_grad()
    def _prepare(self) -> None:
        """Between backward and step: run the rules on gradients, then scale what is to be scaled."""
        self._layers = {}
        self._check_weights()
        self._watched = watched = any(wants(observer, self.steps) for observer in self._observers)
        for path, bound in self._bound.items():
            state, gradient = bound.state, bound.weight.grad
            bound.old = bound.multiplier = None
            if gradient is None:
                continue
            layer = self._layers[path] = LayerStep(state, float("nan"), float("nan"))
            if watched:
                layer.gradient_norm = norm_of_part(local(gradient), gradient)
            with whole(state) if self._reads_values(state) else nullcontext():
                unscaled = self._change_factors(bound, layer)
                bound.multiplier = self._multiplier(bound, layer, done_in_graph=not unscaled)
            if bound.scales_updates or watched or (self._exponentiated and state.is_constrained):
                bound.old = local(state.weight.detach()).clone()
            if bound.multiplier is not None and not bound.scales_updates:
                local(gradient).mul_(local_part(bound.multiplier, gradient).to(gradient.dtype))
                bound.multiplier = None

    def _reads_values(self, state: BioModule) -> bool:
        """Whether a rule that is due before this step must see all of a layer's weight or gradient."""
        follows = state.is_dynamic and not state.follows_in_parts
        dampens = self._is_due("crystallize") and not state.crystallizes_in_parts
        return follows or dampens or self._is_due("volume_dependent_lr")

    def _check_weights(self) -> None:
        """Refuse to step parameters that have been replaced, before anything is changed."""
        for path, bound in self._bound.items():
            if bound.state.parameter is not bound.weight:
                raise PlasticityError(
                    f"{path!r} is another parameter than the one that the optimizer was given; detach(), "
                    "build the optimizer from bio_model.parameters() and attach again"
                )

    def _change_factors(self, bound: _Bound, layer: LayerStep) -> bool:
        """Run the rules that change factors; return whether the gradient now is without factors.

        Where the graph has scaled the gradient, it did so with the factors from before.
        """
        state = bound.state
        scheduled = any(rule.name == "update_fuzzy_learning_rates" for rule in self.rules)
        names = ["crystallize"] if self._is_due("crystallize") else []
        if state.is_dynamic and (not scheduled or self._is_due("update_fuzzy_learning_rates")):
            names.append("update_fuzzy_learning_rates")
        able = [name for name in names if state.why_not(name) is None]
        dampened = state.memory.dampening is not None
        needed = state.scaled_in_graph and (able or bound.scales_updates or dampened)
        factors = state.fuzzy_learning_rate_parameters if needed else None
        used = factors.clone() if factors is not None and able else factors
        if "update_fuzzy_learning_rates" in able:
            average_activity(state, self._group)
        for name in able:
            result = getattr(state, name)()
            layer.touched[name] = result if isinstance(result, int) else 0
        if not state.scaled_in_graph:
            return True
        if used is not None:
            state.unscale_gradient(used)
            return True
        return False

    def _multiplier(self, bound: _Bound, layer: LayerStep, *, done_in_graph: bool) -> Tensor | None:
        """Return what gradient or update is to be multiplied by, None for nothing."""
        state = bound.state
        factors = None if done_in_graph else state.acting_factors
        if not self._is_due("volume_dependent_lr"):
            return factors
        volume = state.volume_factors()
        layer.touched["volume_dependent_lr"] = volume.numel()
        return volume if factors is None else volume.mul_(factors.to(volume.dtype))

    def _is_due(self, name: str) -> bool:
        return any(rule.name == name and rule.is_due(self.steps) for rule in self.rules)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """After the step: rescale updates, write signs back, then run the rules on weights."""
        if self._skips:
            return
        for path, layer in self._layers.items():
            bound, weight = self._bound[path], local(self._bound[path].weight)
            if bound.scales_updates and bound.old is not None and bound.multiplier is not None:
                start = bound.old
                if self._decay == "free":
                    start = start * (1 - _decoupled_decay(optimizer, bound.group))
                # lerp is exact at 0 and at 1
                multiplier = local_part(bound.multiplier, bound.weight).expand_as(weight)
                weight.copy_(torch.lerp(start, weight, multiplier.to(weight.dtype)))
            if self._exponentiated and layer.state.is_constrained and bound.old is not None:
                signs = layer.state.signs().expand(bound.weight.shape)
                exponentiate(weight, bound.old, local_part(signs, bound.weight))
            if self._watched and bound.old is not None:
                layer.update_norm = norm_of_part(weight - bound.old, bound.weight)
            bound.old = bound.multiplier = None
            if layer.state.is_constrained:
                layer.touched["enforce_dales_principle"] = layer.state.enforce_dales_principle()
        for rule in self.rules:
            if rule.name not in _BUILT_IN and rule.is_due(self.steps):
                self._run_on_weights(rule.name, optimizer)
        for observer in self._observers:
            observer(self.steps, self._layers)
        self._layers = {}
        self.steps += 1

    def _run_on_weights(self, name: str, optimizer: Optimizer) -> None:
        able = [layer for layer in self._layers.values() if layer.state.why_not(name) is None]
        for layer in able:
            with whole(layer.state, factors=False):
                layer.state.check(name)
        for layer in able:
            rule = getattr(layer.state, name)
            with whole(layer.state, optimizer, factors=name not in _ON_WEIGHTS):
                result = rule(optimizer) if name == "rejuvenate_weights" else rule()
            layer.touched[name] = result if isinstance(result, int) else 0


def _decoupled_decay(optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """Return the fraction of a weight that decoupled weight decay takes away in a step.

    Raises:
        PlasticityError: the optimizer's weight decay is not decoupled from the gradient.
    """
    if not group.get("weight_decay"):
        return 0.0
    if not (isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay")):
        raise PlasticityError(
            f"decay='free': {type(optimizer).__name__} mixes weight decay into the gradient, where it cannot "
            "be told apart; use decoupled decay (AdamW), or decay='scaled'"
        )
    return float(group["lr"]) * float(group["weight_decay"])


def _will_be_skipped(optimizer: Optimizer) -> bool:
    """Whether a step will change nothing; if it will, unscale the gradients of a ``GradScaler``.

    The scaler does both itself, before the step, but for fused optimizers, which it tells to do it inside.
    """
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is not None and bool(found_inf):
        return True
    if scale is not None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(scale.to(parameter.grad.device))
        optimizer.grad_scale = None  # type: ignore[attr-defined]
    return False
