"""Invariants of Dale's principle: signs in the weights that layers use, after what the graph does to them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from biofx.analysis.readouts import input_facing_nodes, readout_nodes
from biofx.diagnostics.audit import Finding, Subject, Uses, finding, invariant, owner_of
from biofx.errors import InvariantError
from biofx.graph.printing import function_name
from biofx.graph.regions import RegionUse
from biofx.layers.constant_part import ConstantPart, Treatment, WeightUse, moved_alike, weight_operand
from biofx.layers.layer_kind import argument
from biofx.model.observed_runs import INDICES, observed_runs_of
from biofx.operators.sign_ops import constrain_sign, signs_like


@invariant("signs", "no effective weight has the other sign than its presynaptic unit")
def effective_signs(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Count the synapses whose effective weight has the other sign than their unit."""
    for node in _constraints(subject):
        path = _weight_path(subject, uses, node)
        try:
            count = count_signs(uses.constants, node, uses.of_constraint.get(node, []))
        except InvariantError as error:
            advice = "restore the signs from a checkpoint of this model, or transform it again"
            message = f"the sign constraint cannot be computed: {error}; {advice}"
            yield finding(owner_of(path), path, 1, 1, message)
            continue
        message = (
            f"{count.wrong} of {count.synapses} effective weights have the other sign than their unit: "
            "what the graph does after the constraint breaks it; transform the model again"
        )
        yield finding(owner_of(path), path, count.synapses, count.wrong, message, wrong_raw=count.wrong_raw)


@invariant("rule signs", "plasticity rules use the signs that the graph enforces")
def rule_signs(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Count the synapses for which plasticity rules would use another sign than the graph does."""
    for placed in subject.states():
        state = placed.state
        weight = state.parameter
        found = uses.of_parameter.get(id(weight), [])
        signed = (use for use in found if use.constraints and use.before is Treatment.NOTHING)
        use = next(signed, None)
        if use is None or weight is None or weight.is_meta or not state.is_constrained:
            continue
        try:
            wanted = laid_out_signs(uses.constants, use.constraints[0], weight.detach())
            held = state.signs().expand(weight.shape)
        except (InvariantError, RuntimeError, IndexError):
            continue  # said by effective_signs
        others = int((held != wanted).sum())
        message = (
            f"rules such as rejuvenation would give {others} of {weight.numel()} synapses another sign "
            "than the graph allows; load the model from where it was saved whole, or transform it again"
        )
        yield finding(placed.layer, state.path, weight.numel(), others, message)


@invariant("sign values", "a unit's sign is -1, 0 or 1")
def sign_values(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Count the signs that are neither -1, 0 nor 1, once for each buffer that holds them."""
    held: set[int] = set()
    for placed in subject.placed:
        for name, permitted in _SIGN_BUFFERS.items():
            buffer = getattr(placed.state, name)
            if buffer is not None and id(buffer) not in held:
                held.add(id(buffer))
                yield _values(placed.layer, f"{placed.place}.{name}", buffer, permitted)
    for node in _constraints(subject):
        sign = argument(node, 1, "sign")
        if sign not in uses.constants or any(id(leaf) in held for leaf in _leaves(uses, sign)):
            continue
        try:
            value = uses.constants.value(sign)
        except InvariantError:
            continue  # said by effective_signs
        yield _values(owner_of(_weight_path(subject, uses, node)), sign.name, value, (-1, 0, 1))


@invariant("sign constraints", "signs are enforced in the graph, wherever a constrained weight is used")
def bypassed_constraints(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Count the uses of constrained weights that read the parameter beside its constraint.

    A use at a free end of the model, an input or readout layer that shares its weight with one inside, is
    none of them, nor is one of several normalisations that share their factors.
    """
    constrained: dict[int, str] = {}
    for node in _constraints(subject):
        root = _root(node, uses.constants)
        parameter = uses.constants.parameter(root)
        if parameter is not None:
            constrained.setdefault(id(parameter), subject.path_of(parameter, str(root.target)))
    for placed in subject.states():
        if placed.state.is_constrained and placed.state.parameter is not None:
            constrained.setdefault(id(placed.state.parameter), placed.state.path)
    called = _callers(subject, constrained)
    ends: set[Node] | None = None
    for key, path in constrained.items():
        found = [use for use in uses.of_parameter.get(key, []) if _is_judged(use)]
        kept = [use for use in found if use.constraints]
        beside = [use.reader for use in found if not use.constraints] + called.get(key, [])
        raw = [reader for reader in dict.fromkeys(beside) if reader is not None]
        if raw and kept:
            ends = _free_ends(subject) if ends is None else ends
            raw = [reader for reader in raw if reader not in ends and kept[0].parameter.dim() > 1]
        readers = ", ".join(repr(reader.name) for reader in raw)
        message = (
            f"{readers} reads the parameter beside its sign constraint; let the pass take in every use "
            "of the weight, or transform the model again"
        )
        yield finding(owner_of(path), path, len(kept) + len(raw), len(raw), message)


@invariant("gammas", "constrained factors of a normalisation are not negative")
def gammas(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Count the constrained factors of normalisation that are negative: each turns a unit's sign over."""
    normalising = {
        node
        for node, found in uses.of_constraint.items()
        for use in found
        if use.reader is not None and function_name(use.reader.target) in _NORMALISATIONS
    }
    for node in _constraints(subject):
        parameter = uses.constants.parameter(_root(node, uses.constants))
        if parameter is None or parameter.is_meta or (parameter.dim() != 1 and node not in normalising):
            continue
        try:
            gamma: Tensor = uses.constants.value(node)
        except InvariantError:
            continue  # said by effective_signs
        path = _weight_path(subject, uses, node)
        negative = int((gamma < 0).sum())
        message = (
            f"{negative} of {gamma.numel()} factors of the normalisation are negative and turn their "
            "unit's sign over; their signs in the graph must be +1, so transform the model again"
        )
        yield finding(owner_of(path), path, gamma.numel(), negative, message)


@invariant("unit order", "buffers by which the model orders units hold what they held when it was observed")
def unit_order(subject: Subject, uses: Uses) -> Iterator[Finding]:
    """Find indices, as of a permutation, that were exchanged: signs would be those of other units."""
    if not _constraints(subject):
        return
    model = subject.graphs[""]
    held: dict[str, Tensor] = {}
    for graph in observed_runs_of(model).graphs:
        for node in graph.nodes:
            seen = node.meta.get(INDICES, {})
            buffers = [source for source in node.all_input_nodes if source.op == "get_attr"]
            held.update({str(s.target): seen[s.name] for s in buffers if s.name in seen})
    for path, before in held.items():
        owner, _, name = path.rpartition(".")
        now: Tensor | None = getattr(model.get_submodule(owner), name, None)
        changed = now is None or now.shape != before.shape or not torch.equal(now.cpu(), before.cpu())
        message = (
            "it orders units otherwise than when the model was observed, and signs follow the order of that "
            "time; transform a model that holds this order, and load the state into the result"
        )
        yield finding(owner, path, before.numel(), int(changed), message)


_SIGN_BUFFERS = {"sign": (-1, 0, 1), "local_sign": (-1, 0, 1), "constrained_rows": (0, 1)}
_ROUNDING = 1e-3
"""How far from a sign an average of equal ones may be."""
_NORMALISATIONS = ("batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm")


def _constraints(subject: Subject) -> list[Node]:
    graph = subject.graph_module.graph
    return list(graph.find_nodes(op="call_function", target=constrain_sign))


def _values(layer: str, path: str, buffer: Tensor, permitted: tuple[int, ...]) -> Finding:
    if buffer.is_meta:
        return finding(layer, path, 0)
    allowed = torch.tensor(permitted, dtype=buffer.dtype, device=buffer.device)
    near = (buffer.unsqueeze(-1) - allowed).abs().amin(-1) <= _ROUNDING
    wrong = int((~near).sum())
    message = (
        f"{wrong} of {buffer.numel()} entries are none of {', '.join(map(str, permitted))}; restore them "
        "from a checkpoint of this model"
    )
    return finding(layer, path, buffer.numel(), wrong, message)


def _root(node: Node, constants: ConstantPart) -> Node:
    """Return where the weight of a constraint begins: the parameter, where there is one."""
    weight = argument(node, 0, "weight")
    while isinstance(weight, Node) and weight.op != "get_attr" and weight.all_input_nodes:
        weight = weight_operand(weight, constants)
    return weight if isinstance(weight, Node) else node


def _weight_path(subject: Subject, uses: Uses, node: Node) -> str:
    root = _root(node, uses.constants)
    parameter = uses.constants.parameter(root)
    named = str(root.target) if root.op == "get_attr" else node.name
    return named if parameter is None else subject.path_of(parameter, named)


def _leaves(uses: Uses, root: Node) -> Iterator[object]:
    """Yield what an expression reads from the model."""
    pending, seen = [root], {root}
    while pending:
        node = pending.pop()
        if node.op == "get_attr" and node in uses.constants:
            yield uses.constants.value(node)
        new = [source for source in node.all_input_nodes if source not in seen]
        seen.update(new)
        pending += new


def _is_judged(use: WeightUse) -> bool:
    """Whether a use must be constrained if the weight is; parts of a weight may be free."""
    if use.reader is None or use.reader.op == "output":
        return False
    return bool(use.constraints) or use.before is not Treatment.MOVED


def _callers(subject: Subject, wanted: Iterable[int]) -> dict[int, list[Node]]:
    """Return the calls of modules that hold a parameter, by the id of each wanted one."""
    keys = set(wanted)
    found: dict[int, list[Node]] = {}
    use = RegionUse(subject.graph_module, subject.graph_module.graph)
    for node in subject.graph_module.graph.find_nodes(op="call_module"):
        for parameter in subject.graph_module.get_submodule(str(node.target)).parameters():
            if id(parameter) in keys and not (use.is_run_by_python(node) and use.is_apart(parameter)):
                found.setdefault(id(parameter), []).append(node)
    return found


def _free_ends(subject: Subject) -> set[Node]:
    return {*readout_nodes(subject.graph_module), *input_facing_nodes(subject.graph_module)}


_OPTIONS = frozenset(inspect.signature(signs_like).parameters) - {"weight", "sign"}


@dataclass(frozen=True)
class SignCount:
    """How the synapses under sign constraints are doing, counts."""

    synapses: int = 0
    wrong: int = 0
    """Synapses whose effective weight has the other sign than their unit; more than 0 is a fault."""
    wrong_raw: int = 0
    """The same in the parameter, where the graph may yet put it right."""

    def __add__(self, other: SignCount) -> SignCount:
        return SignCount(
            self.synapses + other.synapses, self.wrong + other.wrong, self.wrong_raw + other.wrong_raw
        )


def wrong_signs(weight: Tensor, signs: Tensor) -> int:
    """Return how many entries of a weight have the other sign than theirs in ``signs``, a count."""
    return int((weight * signs < 0).count_nonzero())


def laid_out_signs(constants: ConstantPart, constraint: Node, weight: Tensor) -> Tensor:
    """Return the signs that a ``constrain_sign`` node gives to a weight, broadcastable to it.

    Args:
        constants: the constant part of the node's graph.
        constraint: the node; its signs and options are evaluated.
        weight: what the node is given.

    Raises:
        InvariantError: the signs cannot be computed, or do not fit the weight.
    """
    sign = constants.value(argument(constraint, 1, "sign"))
    options: dict[str, Any] = {
        name: constants.value(value) if isinstance(value, Node) else value
        for name, value in constraint.kwargs.items()
        if name in _OPTIONS
    }
    try:
        signs = signs_like(weight, sign, **options)
        fits = torch.broadcast_shapes(signs.shape, weight.shape) == weight.shape
    except (RuntimeError, IndexError):
        fits = False
    if not fits:
        raise InvariantError(
            f"expected signs that fit a weight of shape {tuple(weight.shape)}, found {sign.numel()} of shape "
            f"{tuple(sign.shape)}"
        )
    return signs


def count_signs(
    constants: ConstantPart,
    constraint: Node,
    uses: Iterable[WeightUse],
    given: Mapping[Node, Any] | None = None,
) -> SignCount:
    """Count the synapses under one ``constrain_sign`` node, as they come out where the weight is used.

    What slices or transposes the weight on its way there does the same to the signs; a mask or another factor
    does not. Where new weights of another shape are computed from it, the signs are counted right behind the
    constraint.

    Args:
        constants: the constant part of the node's graph.
        constraint: the node.
        uses: those that pass through the constraint.
        given: values of some nodes, instead of what they compute.

    Raises:
        InvariantError: the signs cannot be computed, or do not fit the weight.
    """
    held = dict(given or {})
    raw: Tensor = constants.value(argument(constraint, 0, "weight"), held)
    signs = laid_out_signs(constants, constraint, raw).expand(raw.shape)
    if raw.is_meta:
        return SignCount()
    synapses = wrong = 0
    treated = {use.expression: use.after for use in uses}
    for end, treatment in (treated or {constraint: Treatment.NOTHING}).items():
        used, wanted = constants.value(end, held), signs
        if treatment is not Treatment.NOTHING:
            wanted = moved_alike(constants, constraint, end, signs.contiguous())
        if not (isinstance(used, Tensor) and used.shape == wanted.shape):
            used, wanted = constants.value(constraint, held), signs
        synapses += used.numel()
        wrong += wrong_signs(used, wanted)
    return SignCount(synapses, wrong, wrong_signs(raw, signs))
