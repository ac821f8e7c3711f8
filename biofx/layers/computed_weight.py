"""Weights that the forward computes from a parameter: masked, rectified, transposed, signed by the model.

What is computed can have the signs of units where it is known what became of a parameter's own sign: it was
*kept* (a mask, a positive factor, a transposition), it was *lost* (``abs``, ``relu``: the weight is never
negative), or the model has put another one there: ``relu(W) * D`` with D of ±1, as in Song, Yang, Wang,
"Training excitatory-inhibitory recurrent neural networks for cognitive tasks", PLOS Computational
Biology 12 (2016).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from biofx.errors import InvariantError
from biofx.graph.node_kinds import queries_metadata
from biofx.graph.printing import function_name
from biofx.layers.constant_part import ConstantPart
from biofx.layers.layer_kind import LayerKind
from biofx.layers.weight_site import WEIGHT_OPERATORS, parameter_behind, sources_behind


class SignFate(Enum):
    """What became of the sign that a parameter has."""

    KEPT = "kept"
    """The weight has the parameter's sign, or is 0."""
    LOST = "lost"
    """The weight is never negative, whatever the parameter is."""
    BUILT_IN = "built in"
    """The weight has signs that are constants of the model."""
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class ComputedWeight:
    """How a forward computes a layer's weight from one parameter."""

    root: Node
    """The node that reads the parameter."""
    expression: Node
    """What the layer reads, without the operators of biofx behind it."""
    nodes: tuple[Node, ...]
    """The nodes that compute it from parameters, in the graph's order."""
    fate: SignFate
    why: str
    """Why the fate is not known, empty where it is."""
    is_turned: bool
    """Whether the weight is the parameter transposed."""
    is_multiple: bool
    """Whether each entry is a fixed multiple of the parameter's."""
    is_even: bool
    """Whether the weight is the same for a parameter of the other sign, as that of ``abs``."""
    keeps_zeros: bool
    """Whether the weight is 0 wherever the parameter is, as that of ``exp`` is not."""
    kind: LayerKind
    """The kind of the layer by the layout of the weight; that of the site goes by the parameter's."""
    built_in: Tensor | None = None
    """The signs that the model has built in, one for each presynaptic unit, 0 for none; int8."""

    @property
    def readers(self) -> tuple[Node, ...]:
        """The nodes that read the parameter, behind operators or not."""
        return tuple(node for node in self.nodes if sources_behind(node, self.root))

    @property
    def keeps_signs(self) -> bool:
        """Whether the weight has the parameter's sign."""
        return self.fate is SignFate.KEPT

    @property
    def why_no_synapses(self) -> str:
        """Why entries of the parameter are not as strong as the synapses they make, empty where they are."""
        if self.keeps_signs or self.is_even:
            return ""
        return f"the forward computes its weight by {self.words}, so a small entry need not be a weak synapse"

    @property
    def words(self) -> str:
        """Names of the nodes that compute it."""
        return ", ".join(node.name for node in self.nodes)

    def multiples(self, constants: ConstantPart) -> Tensor | None:
        """Return the weight over the parameter, in the parameter's layout; None where that is not fixed."""
        if not self.is_multiple:
            return None
        try:
            found: Tensor = constants.value(self.expression, _ones(self.root, self.nodes, constants))
        except InvariantError:
            return None
        return found.mT if self.is_turned else found


def _ones(root: Node | None, nodes: tuple[Node, ...], constants: ConstantPart) -> dict[Node, Tensor]:
    """Return a tensor of ones in the place of the root, and of each trained parameter that nodes read."""
    found: dict[Node, Tensor] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            behind = parameter_behind(source)
            parameter = None if behind is None else constants.parameter(behind)
            if parameter is not None and (behind is root or parameter.requires_grad):
                found[source] = torch.ones_like(parameter)
    return found


@functools.cache
def turned(kind: LayerKind) -> LayerKind:
    """Return a kind of layer with its weight stored the other way round."""
    return replace(kind, transposed=not kind.transposed)


class CannotCompute(Exception):  # noqa: N818
    """Says why an expression is no weight that is computed entry by entry from one parameter."""


@dataclass(frozen=True)
class _Found:
    """What is known of the value of one node, or of a number."""

    shape: torch.Size
    fate: SignFate
    root: Node | None = None
    """The parameter whose entries it has, None for a constant."""
    is_turned: bool = False
    is_multiple: bool = True
    is_even: bool = False
    keeps_zeros: bool = True
    why: str = ""
    nodes: tuple[Node, ...] = ()
    value: Any = None
    """Of a constant, its value."""

    def behind(self, node: Node, **changes: Any) -> _Found:
        """Return it with a node more, which computes from it."""
        return replace(self, nodes=(*self.nodes, node), **changes)

    def lost_track(self, node: Node, why: str) -> _Found:
        """Return it with a node more, behind which its sign is not known."""
        told = self.why or why
        return self.behind(node, fate=SignFate.UNKNOWN, why=told, is_multiple=False, is_even=False)


class Computations:
    """Finds out how the weights of a graph are computed.

    Args:
        parameters: the parameters of the model, by every path.
        constants: makes the constant part of the graph; called when it is needed first.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], constants: Callable[[], ConstantPart]) -> None:
        self._parameters = parameters
        self._constants = functools.cache(constants)
        self._found: dict[Node, _Found | str] = {}
        self._trained: dict[Node, bool] = {}

    def of_weight(self, weight: Node, kind: LayerKind) -> ComputedWeight | str:
        """Return how the weight that a layer reads is computed, or why that is not known.

        Args:
            weight: the expression that the layer reads.
            kind: of the layer.
        """
        while weight.target in WEIGHT_OPERATORS and isinstance(weight.args[0], Node):
            weight = weight.args[0]
        if weight not in self._found:
            self._found[weight] = self._survey(weight)
        found = self._found[weight]
        if isinstance(found, str):
            return found
        if found.root is None:
            return "no parameter is in it"
        parameter = self._parameters[str(found.root.target)]
        shape = _turned(parameter.shape) if found.is_turned else parameter.shape
        if len(shape) != kind.matrix_axes or found.shape != shape:
            return (
                f"its shape is {tuple(found.shape)}, and that of {found.root.target} {tuple(parameter.shape)}"
            )
        fate, why, built_in = found.fate, found.why, None
        if fate is SignFate.BUILT_IN:
            built_in = self._built_in(weight, found, kind)
            if built_in is None:
                fate, why = SignFate.UNKNOWN, "it has fixed signs, and not one for each presynaptic unit"
        return ComputedWeight(
            *(found.root, weight, tuple(sorted(set(found.nodes))), fate, why, found.is_turned),
            *(found.is_multiple, found.is_even, found.keeps_zeros, kind, built_in),
        )

    def _survey(self, weight: Node) -> _Found | str:
        try:
            return self._follow(weight, weight)
        except CannotCompute as error:
            return str(error)

    def _built_in(self, weight: Node, found: _Found, kind: LayerKind) -> Tensor | None:
        """Return the sign that the model gives to each presynaptic unit, None where it gives several."""
        constants = self._constants()
        try:
            signs = constants.value(weight, _ones(found.root, found.nodes, constants)).sign()
        except InvariantError:
            return None
        by_unit = signs.movedim(kind.input_axis, 0).flatten(1)
        high, low = by_unit.amax(1), by_unit.amin(1)
        return (
            None if kind.kernel_axes or bool((high * low < 0).any()) else (high + low).sign().to(torch.int8)
        )

    # the walk

    def _is_trained(self, node: Node) -> bool:
        """Whether a node follows from a parameter that is trained."""
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [source for source in current.all_input_nodes if source not in self._trained]
            if missing and current not in self._trained:
                pending += missing
                continue
            pending.pop()
            parameter = self._parameters.get(str(current.target)) if current.op == "get_attr" else None
            of_it = parameter is not None and parameter.requires_grad
            before = () if queries_metadata(current) else current.all_input_nodes
            self._trained[current] = of_it or any(self._trained[source] for source in before)
        return self._trained[node]

    def _follow(self, node: Any, whole: Node) -> _Found:
        """Return what is known of a node in the expression of a weight.

        Raises:
            CannotCompute: it is more than a computation entry by entry from one parameter.
        """
        if isinstance(node, (int, float)):
            return _constant(node)
        if not isinstance(node, Node):
            raise CannotCompute(f"{whole.name} takes {node!r}")
        if node.op == "get_attr" and node.target in self._parameters:
            parameter = self._parameters[str(node.target)]
            if parameter.requires_grad or not self._is_trained(whole):
                return _Found(parameter.shape, SignFate.KEPT, node)
        if self._is_trained(whole) and not self._is_trained(node):
            return self._constant_of(node)
        if node.op == "get_attr":
            return self._constant_of(node)
        if node.op not in ("call_function", "call_method"):
            raise CannotCompute(f"{node.name} is no function of parameters alone")
        if node.target in WEIGHT_OPERATORS:
            return self._follow(node.args[0], whole)
        rule = _RULES.get(_name_of(node))
        if rule is None:
            raise CannotCompute(f"{node.name} is more than a sign for each entry")
        given = [self._follow(source, whole) for source in rule.operands(node)]
        if all(entry.root is None for entry in given):
            return self._constant_of(node)
        return rule.apply(node, given, self._constants)

    def _constant_of(self, node: Node) -> _Found:
        try:
            value = self._constants().value(node)
        except InvariantError as error:
            raise CannotCompute(f"{node.name} is not known before the model runs") from error
        return _constant(value)


def _constant(value: Any) -> _Found:
    """Return what is known of a constant."""
    if isinstance(value, (bool, int, float)):
        fate = SignFate.LOST if value >= 0 else SignFate.BUILT_IN
        return _Found(torch.Size(), fate, value=value)
    if not isinstance(value, Tensor):
        raise CannotCompute(f"it is computed with a {type(value).__name__}")
    if value.is_meta or value.is_complex():
        return _Found(value.shape, SignFate.UNKNOWN, value=value)
    is_signed = value.dtype is not torch.bool and not bool((value.detach() >= 0).all())
    return _Found(value.shape, SignFate.BUILT_IN if is_signed else SignFate.LOST, value=value.detach())


# what operations make of signs


@dataclass(frozen=True)
class _Rule:
    """What one operation makes of the sign of its operands."""

    names: tuple[tuple[int, str], ...]
    """The operands, by place and by name."""
    apply: Callable[[Node, list[_Found], Callable[[], ConstantPart]], _Found]

    def operands(self, node: Node) -> list[Any]:
        """Return the operands of a call."""
        return [_argument(node, place, name) for place, name in self.names]


def _argument(node: Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def _name_of(node: Node) -> str:
    if node.target is getattr:
        return f"getattr {node.args[1]}"
    name = function_name(node.target)
    return f".{name}" if node.op == "call_method" and name == "where" else name


def _kept(node: Node, given: list[_Found], constants: Any) -> _Found:
    return given[0].behind(node)


def _bent(node: Node, given: list[_Found], constants: Any) -> _Found:
    """A function that is 0 at 0, and above it where its argument is."""
    return given[0].behind(node, is_multiple=False)


def _never_negative(node: Node, given: list[_Found], constants: Any) -> _Found:
    even = given[0].is_even or (_name_of(node) in _EVEN and given[0].fate is SignFate.KEPT)
    zeros = given[0].keeps_zeros and _name_of(node) not in _POSITIVE
    changes = {"is_multiple": False, "is_even": even, "keeps_zeros": zeros}
    return given[0].behind(node, fate=SignFate.LOST, why="", **changes)


def _clamped(node: Node, given: list[_Found], constants: Any) -> _Found:
    name = _name_of(node)
    default = (-1, 1) if name == "hardtanh" else (None, None)
    low = _argument(node, 1, "min_val" if name == "hardtanh" else "min")
    high = None if name == "clamp_min" else _argument(node, 2, "max_val" if name == "hardtanh" else "max")
    low, high = (default[0] if low is None else low), (default[1] if high is None else high)
    if not all(bound is None or isinstance(bound, (int, float)) for bound in (low, high)):
        return given[0].lost_track(node, f"the bounds of {node.name} are computed in the graph")
    if low is not None and low >= 0:
        return replace(_never_negative(node, given, constants), keeps_zeros=given[0].keeps_zeros and low == 0)
    if high is not None and high < 0:
        return replace(given[0].lost_track(node, f"{node.name} makes it negative"), keeps_zeros=False)
    return _bent(node, given, constants)


def _power(node: Node, given: list[_Found], constants: Any) -> _Found:
    exponent = _argument(node, 1, "exponent")
    if isinstance(exponent, int) and exponent > 0:
        return (_bent if exponent % 2 else _never_negative)(node, given, constants)
    raised = given[0].lost_track(node, f"{node.name} raises it to the power {exponent}")
    return replace(raised, keeps_zeros=False)


def _negated(node: Node, given: list[_Found], constants: Any) -> _Found:
    found = given[0]
    if found.fate in (SignFate.LOST, SignFate.BUILT_IN):
        return found.behind(node, fate=SignFate.BUILT_IN)
    return found.lost_track(node, f"{node.name} turns its sign over")


def _transposed(node: Node, given: list[_Found], constants: Any) -> _Found:
    """Two axes are exchanged: those of a matrix, or of each matrix of a stack."""
    found, rank = given[0], len(given[0].shape)
    axes: list[Any] = [] if node.target is getattr else [*node.args[1:], *node.kwargs.values()]
    axes = [axis for entry in axes for axis in (entry if isinstance(entry, (list, tuple)) else [entry])]
    order = [axis % rank for axis in axes if isinstance(axis, int)] if rank else []
    of_all = not axes and (rank == 2 or _name_of(node) in ("getattr mT", "adjoint"))
    is_swap = of_all or sorted(order) in ([rank - 2, rank - 1], list(range(rank)))
    is_permutation = function_name(node.target) == "permute"
    if rank not in (2, 3) or not is_swap or (rank == 3 and is_permutation):
        raise CannotCompute(f"{node.name} moves more than the two axes of a matrix")
    if is_permutation and order == [0, 1]:
        return found.behind(node)
    return found.behind(node, shape=_turned(found.shape), is_turned=not found.is_turned)


def _turned(shape: torch.Size) -> torch.Size:
    return torch.Size((*shape[:-2], *shape[:-3:-1]))


def _reshaped(node: Node, given: list[_Found], constants: Callable[[], ConstantPart]) -> _Found:
    """Axes merged, taken apart or of size 1, as long as entries keep their order."""
    if given[0].is_turned:
        raise CannotCompute(f"{node.name} takes entries in the order of the transposed parameter")
    try:
        shape = constants().value(node).shape
    except (InvariantError, AttributeError) as error:
        raise CannotCompute(f"the shape of {node.name} is not known before the model runs") from error
    return given[0].behind(node, shape=shape)


def _reduced(node: Node, given: list[_Found], constants: Callable[[], ConstantPart]) -> _Found:
    """A norm, or a sum of what is not negative: fit for a factor."""
    found = given[0]
    try:
        shape = constants().value(node).shape
    except (InvariantError, AttributeError) as error:
        raise CannotCompute(f"the shape of {node.name} is not known before the model runs") from error
    positive = _name_of(node) in _NORMS or found.fate is SignFate.LOST
    made = (
        _never_negative(node, given, constants)
        if positive
        else found.lost_track(node, f"{node.name} sums it")
    )
    return replace(made, shape=shape, is_even=False)


def _multiplied(node: Node, given: list[_Found], constants: Any) -> _Found:
    main, other = _main_first(node, *given)
    if main.root is other.root and main.nodes == other.nodes:
        return _never_negative(node, [main], constants)  # w * w
    return _by_factor(node, main, other)


def _divided(node: Node, given: list[_Found], constants: Any) -> _Found:
    main, other = given
    if main.root is None:
        raise CannotCompute(f"{node.name} divides by it")
    _same_layout(node, main, other)
    if other.root is main.root and other.keeps_zeros:
        told = main.lost_track(node, f"{node.name} divides it by what is 0 where signs leave nothing")
        return replace(told, nodes=(*main.nodes, *other.nodes, node), keeps_zeros=False)
    return _by_factor(node, main, other)


def _mixed(node: Node, given: list[_Found], constants: Any) -> _Found:
    """A product with a diagonal matrix multiplies each row or column."""
    main, other = _main_first(node, *given)
    diagonal = other.value
    is_square = isinstance(diagonal, Tensor) and diagonal.dim() == 2 and len(set(diagonal.shape)) == 1
    if not is_square or len(main.shape) != 2 or diagonal.is_meta or _off_diagonal(diagonal):
        raise CannotCompute(f"{node.name} is a product with a matrix that is not known to be diagonal")
    entries = diagonal.diagonal()
    factor = replace(other, shape=entries.shape if main is given[0] else torch.Size((len(entries), 1)))
    return _by_factor(node, main, factor)


def _off_diagonal(matrix: Tensor) -> bool:
    return bool((matrix - matrix.diagonal().diag()).any())


def _main_first(node: Node, left: _Found, right: _Found) -> tuple[_Found, _Found]:
    """Return the operand that has the entries of the weight, and the one that is a factor."""
    if left.root is None or right.root is None:
        return (right, left) if left.root is None else (left, right)
    _same_layout(node, left, right)
    left_first = left.shape.numel() >= right.shape.numel()
    if left.shape == right.shape and left.root is not right.root:
        left_first = left.fate is not SignFate.LOST or right.fate is SignFate.LOST
    return (left, right) if left_first else (right, left)


def _same_layout(node: Node, left: _Found, right: _Found) -> None:
    if left.root is right.root and left.is_turned != right.is_turned:
        raise CannotCompute(f"{node.name} joins it with itself transposed")


def _check_fits(node: Node, main: _Found, *others: _Found) -> None:
    """Refuse what makes more entries than the parameter has.

    Raises:
        CannotCompute: it does, or the shapes do not fit at all.
    """
    try:
        fits = torch.broadcast_shapes(main.shape, *(other.shape for other in others)) == main.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise CannotCompute(f"{node.name} makes it larger than the parameter")


def _by_factor(node: Node, main: _Found, factor: _Found) -> _Found:
    """Return what is known of a weight that is multiplied or divided, entry by entry."""
    _check_fits(node, main, factor)
    made = replace(
        main, nodes=(*main.nodes, *factor.nodes), is_multiple=main.is_multiple and factor.root is None
    )
    if factor.fate is SignFate.LOST:
        return made.behind(node)
    if factor.fate is SignFate.BUILT_IN and factor.root is None:
        if main.fate in (SignFate.LOST, SignFate.BUILT_IN):
            return made.behind(node, fate=SignFate.BUILT_IN)
        return made.lost_track(node, f"{node.name} multiplies it by constants, some of which are negative")
    return made.lost_track(node, f"{node.name} multiplies it by something whose sign is not known")


def _added(node: Node, given: list[_Found], constants: Any) -> _Found:
    main, other = _main_first(node, *given)
    if other.root is not None and other.root is not main.root:
        raise CannotCompute(f"{node.name} adds {other.root.target} to {main.root.target if main.root else 0}")
    _check_fits(node, main, other)
    both = (main.fate, other.fate) == (SignFate.LOST, SignFate.LOST)
    zeros = main.keeps_zeros and other.root is main.root and other.keeps_zeros
    made = replace(main, nodes=(*main.nodes, *other.nodes), is_multiple=False, keeps_zeros=zeros)
    if both and function_name(node.target) == "add":
        return made.behind(node)
    return made.lost_track(node, f"{node.name} adds something to it")


def _filled(node: Node, given: list[_Found], constants: Any) -> _Found:
    """``masked_fill``, ``where``: some entries are replaced."""
    is_where = function_name(node.target) == "where"
    condition, main, fill = given if is_where else (given[1], given[0], given[2])
    if main.root is None:
        main, fill = fill, main
    if main.root is None or fill.root is not None:
        raise CannotCompute(f"{node.name} chooses among several weights")
    _check_fits(node, main, fill, condition)
    made = replace(main, nodes=(*main.nodes, *condition.nodes))
    is_zero = fill.fate is SignFate.LOST and not bool(torch.as_tensor(fill.value).any())
    if is_zero or (main.fate is SignFate.LOST and fill.fate is SignFate.LOST):
        both = {"is_multiple": made.is_multiple and is_zero, "keeps_zeros": made.keeps_zeros and is_zero}
        return made.behind(node, **both)
    return replace(made.lost_track(node, f"{node.name} fills in values of its own"), keeps_zeros=False)


_EVEN = frozenset({"abs", "square", "pow"})
_POSITIVE = frozenset({"softplus", "exp", "sigmoid", "hardsigmoid", "softmax"})
"""Functions that are not 0 at 0."""
_NORMS = frozenset({"norm", "vector_norm", "linalg_vector_norm", "linalg_norm", "std", "var"})
_ONE = ((0, "input"),)
_TWO = ((0, "input"), (1, "other"))


def _rules() -> Iterator[tuple[str, _Rule]]:
    families: list[tuple[Any, tuple[tuple[int, str], ...], str]] = [
        (_kept, _ONE, "contiguous clone to float double half bfloat16 type_as dropout tril triu"),
        (_bent, _ONE, "tanh softsign erf asinh atan arctan sinh normalize"),
        (_never_negative, _ONE, "abs relu relu6 softplus exp square sigmoid hardsigmoid softmax"),
        (_clamped, _ONE, "clamp clip clamp_min hardtanh"),
        (_power, _ONE, "pow"),
        (_negated, _ONE, "neg negative"),
        (_transposed, _ONE, "t transpose swapaxes swapdims permute adjoint"),
        (_reshaped, _ONE, "squeeze unsqueeze view reshape flatten unflatten"),
        (_reduced, _ONE, "sum mean amax norm vector_norm linalg_vector_norm linalg_norm std var"),
        (_multiplied, _TWO, "mul multiply"),
        (_divided, _TWO, "div divide true_divide truediv"),
        (_mixed, _TWO, "matmul"),
        (_mixed, ((0, "input"), (1, "mat2")), "mm"),
        (_added, _TWO, "add sub subtract"),
        (_filled, ((0, "input"), (1, "mask"), (2, "value")), "masked_fill"),
        (_filled, ((0, "condition"), (1, "input"), (2, "other")), "where"),
        (_filled, ((1, "condition"), (0, "input"), (2, "other")), ".where"),
    ]
    for apply, names, words in families:
        for word in words.split():
            yield word, _Rule(names, apply)
    for name in ("T", "mT"):
        yield f"getattr {name}", _Rule(_ONE, _transposed)


_RULES: Mapping[str, _Rule] = dict(_rules())


def read_outside(computed: ComputedWeight, is_reader: Callable[[Node, Node], bool]) -> Node | None:
    """Return something that reads the computed weight, or what it is computed from, besides layers.

    Args:
        computed: the weight.
        is_reader: whether a node is a layer that reads another node as its weight, or computes a weight.
    """
    own = set(computed.nodes)
    for node in computed.nodes:
        for user in node.users:
            if user not in own and not queries_metadata(user) and not is_reader(user, node):
                return user
    return None
