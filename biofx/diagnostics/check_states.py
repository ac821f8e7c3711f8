"""Invariants of learning-rate factors, of plasticity states, and of numbers in general."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

from biofx.diagnostics.audit import (
    Finding,
    Placed,
    Subject,
    Uses,
    finding,
    invariant,
    layer_around,
    owner_of,
)
from biofx.graph.regions import ELSEWHERE
from biofx.layers.constant_part import WeightUse
from biofx.layers.layer_kind import argument
from biofx.layers.weight_site import computed_behind, weight_blocker
from biofx.operators.rate_ops import GRADIENT_SCALINGS, sampling_of, scale_gradient_by_seed
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.model_states import bio_module_path
from biofx.plasticity.sub_weights import split_states, sub_weights

_FACTORS = "fuzzy_learning_rate_parameters"
_ROUNDING = 2**-8  # relative; a factor at a bound may be, or once have been, held in bfloat16


@invariant("rates", "learning-rate factors are finite and within their layer's bounds")
def rates(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Count the factors that are not finite or out of the layer's own bounds."""
    for placed in subject.states():
        state = placed.state
        config = state.config
        low, high = config.fuzzy_lr_bounds
        low = min(low, config.crystal_min)
        for name in (_FACTORS, "diversity"):
            factors: Tensor | None = getattr(state, name)
            if factors is None or factors.is_meta:
                continue
            held = factors.float()
            inside = (held >= low * (1 - _ROUNDING)) & (held <= high * (1 + _ROUNDING))
            outside = int((~inside).sum())
            message = (
                f"{outside} of {factors.numel()} learning-rate factors are NaN or outside "
                f"[{low:g}, {high:g}], the bounds in the layer's config; draw them again "
                "(bio_mod.draw()), load a sound checkpoint, or give bio_mod.config the bounds that they "
                "were drawn with"
            )
            yield finding(placed.layer, f"{placed.place}.{name}", factors.numel(), outside, message)


@invariant("rate shapes", "learning-rate factors broadcast to their weight")
def rate_shapes(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Find factors that do not broadcast to their weight."""
    for placed in subject.states():
        factors, weight = placed.state.fuzzy_learning_rate_parameters, placed.state.parameter
        if factors is None or weight is None:
            continue
        fits = factors.dim() == weight.dim() and all(
            one in (1, other) for one, other in zip(factors.shape, weight.shape, strict=True)
        )
        message = (
            f"factors of shape {tuple(factors.shape)} do not fit a weight of shape "
            f"{tuple(weight.shape)}; draw them again (bio_mod.draw())"
        )
        yield finding(placed.layer, f"{placed.place}.{_FACTORS}", 1, int(not fits), message)


@invariant(
    "scaling", "gradients are scaled by their own factors, once, in the graph or by calls as the state says"
)
def scaling(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Count the uses of a weight whose gradient is not scaled as its state says."""
    for placed in subject.states():
        state = placed.state
        if state.parameter is None and _scales_computed(placed, uses):
            yield finding(placed.layer, state.path, 1, 0, "")
            continue
        found = uses.of_parameter.get(id(state.parameter), [])
        reasons = [reason for use in found if (reason := _misscaled(use, state, uses))]
        message = "; ".join(dict.fromkeys(reasons))
        violated = len(reasons)
        if state.scaled_in_graph and not any(use.scalings for use in found):
            violated = max(1, len(found))
            message = (
                "its factors are meant to act in the graph (scaled_in_graph) and the graph does not scale "
                "its gradient; transform the model again"
            )
        yield finding(placed.layer, state.path, max(1, len(found)), violated, message)


def _scales_computed(placed: Placed, uses: Uses) -> bool:
    """Whether the graph scales the gradient of a weight that a parametrization computes."""
    scalings = [node for node in uses.constants.graph.nodes if node.target in GRADIENT_SCALINGS]
    return any(computed_behind(node) == placed.state.path for node in scalings)


def _misscaled(use: WeightUse, state: BioModule, uses: Uses) -> str:
    if not use.scalings:
        return ""
    if len(use.scalings) > 1:
        return f"the gradient of {use.path!r} is scaled {len(use.scalings)} times; transform the model again"
    if not state.scaled_in_graph:
        return (
            "its gradient is scaled in the graph, and its state does not say so: a call of "
            "fuzzy_learning_rates() would scale it again; set bio_mod.scaled_in_graph = True"
        )
    (scaling,) = use.scalings
    if scaling.target is scale_gradient_by_seed:
        if sampling_of(scaling) == state.rate_sampling:
            return ""
        return f"{scaling.name!r} draws other factors for its gradient than it has; transform the model again"
    factors = argument(scaling, 1, "factor")
    if (
        factors.op == "get_attr"
        and factors in uses.constants
        and uses.constants.value(factors) is not state.stored_factors
    ):
        return (
            f"its gradient is scaled by {factors.target}, not by its own factors; transform the model again"
        )
    return ""


@invariant("finite", "weights and plasticity states are finite")
def finite(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Count the parameters and buffers of plasticity that are NaN or infinite."""
    for path, parameter in subject.parameters.values():
        yield _finite(owner_of(path), path, parameter)
    seen: set[int] = set()
    for placed in subject.placed:
        for name, buffer in placed.state.named_buffers(recurse=False):
            if id(buffer) not in seen:
                seen.add(id(buffer))
                yield _finite(placed.layer, f"{placed.place}.{name}", buffer)


def _finite(layer: str, path: str, tensor: Tensor) -> Finding:
    lazy = (nn.UninitializedParameter, nn.UninitializedBuffer)
    if isinstance(tensor, lazy) or tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return finding(layer, path, 0)
    if weight_blocker(tensor) is not None and tensor.numel():
        return finding(layer, path, 0)
    held = tensor.detach()
    wrong, message = 0, ""
    if held.is_complex() or not math.isfinite(held.sum().item()):  # one pass where nothing is wrong
        wrong = int((~held.isfinite()).sum())
    if wrong:
        message = (
            f"{wrong} of {tensor.numel()} numbers are NaN or infinite; lower the learning rate or clip the "
            "gradient, and start from a sound checkpoint"
        )
    return finding(layer, path, tensor.numel(), wrong, message)


@invariant("links", "every state belongs to the layer it sits in")
def links(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Find plasticity states that do not belong to the layer they sit in."""
    places: dict[int, set[str]] = {}
    for placed in subject.placed:
        places.setdefault(id(placed.state), set()).add(placed.place)
    for placed in subject.placed:
        reason = _unlinked(subject, placed, places[id(placed.state)])
        message = (
            f"{reason}; give each layer its own state back (transform or convert the model again, or "
            "load it from where it was saved whole)"
        )
        yield finding(placed.layer, placed.place, 1, int(bool(reason)), message)


def _unlinked(subject: Subject, placed: Placed, places: set[str]) -> str:
    """Return why a state does not belong where it is, or nothing."""
    state = placed.state
    if not state.is_linked:
        holds_others = any(isinstance(child, BioModule) for child in state.children())
        return "" if holds_others else "it is linked to no layer"
    model = subject.graphs[""]  # not the view of it, which is no module's parent
    layer = model.get_submodule(_sits_in(placed.place))
    declared = vars(model).get("region_paths", ())
    moved = ELSEWHERE in vars(layer) and placed.layer not in declared  # by an adapter around the layer
    if not moved and bio_module_path(state.path) not in places:
        return f"it is the state of {state.path!r}, and sits in {placed.place!r}"
    linked = state.get_parent()
    tied = state.parameter is not None and any(
        parameter is state.parameter for parameter in layer._parameters.values()
    )
    if linked is not layer and not tied:
        return f"it is linked to another {type(linked).__name__} than the one it sits in"
    if moved:
        return ""
    home = model.get_submodule(state.path.rpartition(".")[0])
    return "" if linked is home else f"it is linked to another {type(linked).__name__} than {state.path!r}'s"


def _sits_in(place: str) -> str:
    """Return the path of the module in which a state sits: a layer, or what holds a sub-weight of one."""
    return f".{place}".rpartition(".bio_mod")[0][1:]


@invariant("sub-weights", "a layer reads the sum of all its sub-weights, wherever it reads one of them")
def sub_weight_sums(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Find sub-weights that a use of their layer leaves out, or that are not shaped alike."""
    for prefix, state in split_states(subject.graph_module).items():
        expected = len(uses.of_parameter.get(id(state.parameter), []))
        for name, further in sub_weights(state).items():
            found = len(uses.of_parameter.get(id(further), []))
            message = ""
            if further.shape != state.weight.shape:
                message = (
                    f"its shape is {tuple(further.shape)}, that of the first {tuple(state.weight.shape)}"
                )
            elif found != expected:
                message = f"the graph reads it {found} times, and the first sub-weight {expected} times"
            if message:
                message += "; load the model from where it was saved whole, or transform it again"
            layer = layer_around(prefix.removesuffix("."))
            yield finding(layer, prefix + name, 1, int(bool(message)), message)


@invariant("devices", "every state is on its weight's device")
def devices(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Count the buffers of plasticity that are on another device than their weight; counters may be."""
    for placed in subject.states():
        weight = placed.state.parameter
        if weight is None:
            continue
        buffers = [buffer for _, buffer in placed.state.named_buffers(recurse=False) if buffer.dim()]
        elsewhere = [buffer for buffer in buffers if buffer.device != weight.device]
        found = ", ".join(sorted({str(buffer.device) for buffer in elsewhere}))
        message = (
            f"{len(elsewhere)} of its buffers are on {found}, the weight is on {weight.device}; move the "
            "whole model (bio_model.to(device))"
        )
        yield finding(placed.layer, placed.place, len(buffers), len(elsewhere), message)
