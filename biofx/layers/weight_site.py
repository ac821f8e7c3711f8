"""A use of a weight in a graph: by a layer, or by something else."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from biofx.errors import PassError
from biofx.graph.analysis_cache import cached_on_graph
from biofx.graph.node_kinds import changed_in_place, queries_metadata
from biofx.layers.layer_kind import ONE_WEIGHT, LayerKind, WeightSlot
from biofx.layers.synaptic_reads import is_synaptic_read
from biofx.operators.mask_ops import mask_weight
from biofx.operators.rate_ops import GRADIENT_SCALINGS
from biofx.operators.sign_ops import constrain_sign
from biofx.operators.split_ops import fold_weight, level_gradient, sum_sub_weights
from biofx.torch_private import MODULES_OF_TENSORS

if TYPE_CHECKING:
    from biofx.layers.computed_weight import ComputedWeight

WEIGHT_OPERATORS: frozenset[Callable[..., Any]] = GRADIENT_SCALINGS | {
    *(mask_weight, constrain_sign, fold_weight, level_gradient, sum_sub_weights)
}
"""What may stand between a parameter and the layer that uses it."""


READ = LayerKind(
    *(nn.Module, getattr), why_no_units="it is used directly, and not as the weight of a layer with units"
)
"""The kind of a read that is no layer's."""


@dataclass(frozen=True)
class ReadSlot(WeightSlot):
    """All the places where one expression is read that are no layer's."""

    source: Node | None = None
    """The expression: the node that reads the parameter, or an operator on it."""
    readers: tuple[Node, ...] = ()

    def is_synaptic(self, parameter: nn.Parameter) -> bool:
        """Whether the parameter, as it is read here, is a weight between units."""
        return self.source is not None and is_synaptic_read(parameter, self.source, self.readers)

    def read(self, node: Node) -> Any:
        """Return the expression."""
        return self.source

    def write(self, node: Node, weight: Node) -> None:
        """Let all of the readers read another expression."""
        if self.source is not None:
            for reader in self.readers:
                reader.replace_input_with(self.source, weight)


@dataclass(frozen=True)
class SubWeightSlot(WeightSlot):
    """The place of one of several weights whose sum a layer reads."""

    number: int = 0
    """Which of them, from 0."""

    def whole(self, node: Node) -> Any:
        """Return what the layer reads: the sum, or what is computed from it."""
        return WeightSlot.read(self, node)

    def read(self, node: Node) -> Any:
        """Return the sub-weight's expression, one of those that are added up."""
        return self.reader(node).args[self.number]

    def write(self, node: Node, weight: Node) -> None:
        """Add another expression up in its place."""
        self.reader(node).update_arg(self.number, weight)

    def reader(self, node: Node) -> Node:
        """Return the node that adds the sub-weights up."""
        found = sum_behind(self.whole(node))
        if found is None:
            raise PassError(f"expected a sum of sub-weights at {node.name!r}, found {self.whole(node)}")
        return found


@dataclass(frozen=True)
class ParameterSlot(WeightSlot):
    """The place where the forward begins to compute a weight from its parameter."""

    root: Node | None = None
    readers: tuple[Node, ...] = ()

    def read(self, node: Node) -> Any:
        """Return the parameter, with the operators on it."""
        return next(iter(sources_behind(self.readers[0], self.root)), None)

    def write(self, node: Node, weight: Node) -> None:
        """Let the computation start from another expression of the parameter."""
        for reader in self.readers:
            for source in sources_behind(reader, self.root):
                if source is not weight:
                    reader.replace_input_with(source, weight)


@dataclass(frozen=True)
class WeightSite:
    """One use of one weight."""

    node: Node
    """The node that computes the layer's output."""
    kind: LayerKind
    parameter_path: str
    """Path of the weight; of a tied weight, the first path it goes by."""
    parameter: nn.Parameter = field(repr=False)
    groups: int
    value_blocker: str | None
    """Why nothing may be done with the weight's values, or None."""
    slot: WeightSlot = ONE_WEIGHT
    """Which of the layer's weights it is."""
    lowering_blocker: str | None = None
    """Why the weight cannot even be made visible, so that its gradient could be scaled, or None."""
    is_computed: bool = False
    """Whether a parametrization computes the weight; ``parameter`` has its shape then, and no values."""
    computation: ComputedWeight | None = field(default=None, repr=False)
    """How the forward computes the weight from the parameter, None where the layer reads that itself."""
    first: nn.Parameter | None = field(default=None, repr=False)
    """Of a sub-weight but the first that one, which an observed run shows; None for all other weights."""

    @property
    def role(self) -> str:
        """What the weight's presynaptic units are, ``"input"`` where it reads the layer's input."""
        return self.slot.role

    @property
    def whole_path(self) -> str:
        """Path of the weight that it is a sub-weight of; its own path where it is none, or the first."""
        return whole_weight(self.parameter_path)

    @property
    def is_further(self) -> bool:
        """Whether it is a sub-weight other than the first, which stands for them all."""
        return isinstance(self.slot, SubWeightSlot) and self.slot.number > 0

    @property
    def layer(self) -> str:
        """Path of the module that owns the weight, empty for the model itself."""
        return self.whole_path.rpartition(".")[0]

    @property
    def weight_node(self) -> Node | None:
        """The weight expression the site reads, None while the layer module still hides it."""
        if self.node.op == "call_module" and self.kind is not READ:
            return None
        weight = self.slot.read(self.node)
        return weight if isinstance(weight, Node) else None

    @property
    def whole_weight_node(self) -> Node | None:
        """The expression that the layer reads: of sub-weights their sum, or what is computed from it."""
        if not isinstance(self.slot, SubWeightSlot):
            return self.weight_node
        weight = self.slot.whole(self.node)
        return weight if isinstance(weight, Node) else None

    @property
    def operators(self) -> list[Node]:
        """The operators on the way from the parameter to the site, innermost first."""
        found = []
        node = self.weight_node
        while node is not None and node.target in WEIGHT_OPERATORS:
            found.append(node)
            node = node.args[0] if isinstance(node.args[0], Node) else None
        before = [] if self.computation is None else self.at_parameter.operators
        return [*before, *found[::-1]]

    @property
    def at_parameter(self) -> WeightSite:
        """The place where the parameter is read: the layer, or where the computation of its weight begins."""
        if self.computation is None:
            return self
        readers = self.computation.readers
        slot = ParameterSlot(self.slot.name, self.slot.role, root=self.computation.root, readers=readers)
        return replace(self, node=readers[0], slot=slot, computation=None)

    @property
    def signs_parameter(self) -> bool:
        """Whether signs act on the parameter, not on what is computed from it."""
        return self.computation is None or self.computation.keeps_signs

    @property
    def where_signed(self) -> WeightSite:
        """The place where signs act: the parameter, if the weight has its sign, else where it is used."""
        if self.signs_parameter or self.computation is None:
            return self.at_parameter
        return replace(self, kind=self.computation.kind, computation=None)

    @property
    def output_channels(self) -> int:
        """Channels of the output (its postsynaptic units), a count; gates do not count."""
        channels = self.parameter.shape[self.kind.output_axis]
        return channels * self.groups if self.kind.transposed else channels // self.slot.blocks

    @property
    def input_channels(self) -> int:
        """Channels of the layer's input (its presynaptic units), a count."""
        channels = self.parameter.shape[self.kind.input_axis]
        return channels if self.kind.transposed else channels * self.groups

    @property
    def why_no_channels(self) -> str | None:
        """Why the node's output is not one tensor with a channel for each unit, None if it is."""
        if self.kind.why_no_units:
            return self.kind.why_no_units
        if self.kind.why_no_channels or not self.kind.is_compound:
            return self.kind.why_no_channels or None
        return f"{self.kind.name} returns more than this weight's output"

    @property
    def is_plain_layer(self) -> bool:
        """Whether it is a layer with one weight, a parameter, whose outputs a module could have."""
        return self.why_no_channels is None and not self.kind.is_product and self.computation is None

    def has(self, operator: Callable[..., Any]) -> bool:
        """Whether the weight already passes through ``operator`` on its way here."""
        return any(node.target is operator for node in self.operators)

    @property
    def is_scaled(self) -> bool:
        """Whether the weight's gradient is scaled on the way back from here, by factors stored or sampled."""
        return any(node.target in GRADIENT_SCALINGS for node in self.operators)

    def describe(self, message: str) -> str:
        """Return a message about the weight; it begins with its name where the layer has several."""
        if isinstance(self.slot, SubWeightSlot):
            message = f"sub-weight {self.slot.number + 1}: {message}"
        return f"{self.slot.name}: {message}" if self.kind.is_compound or self.kind is READ else message


@dataclass(frozen=True)
class UnsupportedLayer:
    """A layer whose weights cannot be reached, so that no pass can rewrite it."""

    layer: str
    node: Node | None
    reason: str


@dataclass(frozen=True)
class Sites:
    """Everything in a model that has, or should have, a weight site."""

    found: list[WeightSite]
    """In execution order."""
    unsupported: list[UnsupportedLayer]
    reads: list[WeightSite] = field(default_factory=list)
    """What else reads parameters, of kind ``READ``; in execution order."""

    def weights(self) -> list[Weight]:
        """Return the weights, in order of their first use, each with all its sites."""
        uses = _by_parameter(self.found)
        places: dict[str, int] = {}
        for sites in uses.values():  # sub-weights of one weight have one place
            places.setdefault(sites[0].whole_path, len(places))
        last = max(1, len(places) - 1)
        return [Weight(tuple(sites), places[sites[0].whole_path] / last) for sites in uses.values()]

    def weights_and_reads(self, *, directly: bool) -> list[Weight]:
        """Return the weights with all other reads of them, and the parameters that only a product reads.

        Args:
            directly: whether to return all other parameters too that a graph reads.
        """
        reads = _by_parameter(self.reads)
        weights = [
            Weight((*weight.sites, *reads.pop(id(weight.parameter), ())), weight.depth)
            for weight in self.weights()
        ]
        in_order = sorted(weights, key=lambda weight: weight.sites[0].node)
        deepest = list(accumulate((weight.depth for weight in in_order), max))
        for sites in reads.values():
            first = sites[0]
            if directly or any(
                isinstance(site.slot, ReadSlot) and site.slot.is_synaptic(first.parameter) for site in sites
            ):
                before = bisect_left(in_order, first.node, key=lambda weight: weight.sites[0].node)
                weights.append(Weight(tuple(sites), deepest[before - 1] if before else 0.0))
        return weights


@dataclass(frozen=True)
class Weight:
    """A weight and some or all of its uses."""

    sites: tuple[WeightSite, ...]
    depth: float
    """Place in execution order, 0 for the first weight of the model and 1 for the last."""

    @property
    def path(self) -> str:
        """Path of the parameter."""
        return self.sites[0].parameter_path

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter itself."""
        return self.sites[0].parameter


def _by_parameter(sites: list[WeightSite]) -> dict[int, list[WeightSite]]:
    uses: dict[int, list[WeightSite]] = {}
    for site in sites:
        uses.setdefault(id(site.parameter), []).append(site)
    return uses


def parameter_behind(node: Any) -> Node | None:
    """Return the ``get_attr`` node at the root of a weight expression, None if it is something else."""
    while isinstance(node, Node) and node.op == "call_function" and node.target in WEIGHT_OPERATORS:
        node = node.args[0]
    return node if isinstance(node, Node) and node.op == "get_attr" else None


def sources_behind(node: Node, root: Node | None) -> list[Node]:
    """Return the inputs of a node that are a parameter, read by ``root``, or operators on it."""
    return [source for source in node.all_input_nodes if parameter_behind(source) is root]


def computed_behind(node: Any) -> str | None:
    """Return the path of the weight at the root of an expression if a parametrization computes it."""
    while isinstance(node, Node) and node.op == "call_function" and node.target in WEIGHT_OPERATORS:
        node = node.args[0]
    if not isinstance(node, Node) or node.target is not getattr:
        return None
    owner = node.args[0]
    return f"{owner.target}.{node.args[1]}" if isinstance(owner, Node) and owner.op == "get_attr" else None


def sum_behind(weight: Any) -> Node | None:
    """Return the node that adds up the sub-weights in a weight expression, None if there are none."""
    node = weight
    while isinstance(node, Node) and node.target in WEIGHT_OPERATORS and node.target is not sum_sub_weights:
        node = node.args[0]
    return node if isinstance(node, Node) and node.target is sum_sub_weights else None


_SUB_WEIGHT = re.compile(r"(|.+\.)bio_mod\.(?:([^.]+)\.)?sub_weight_\d+\.weight")


def whole_weight(parameter_path: str) -> str:
    """Return the path of the weight that a sub-weight belongs to; the same path where it is none.

    >>> whole_weight("fc.bio_mod.sub_weight_2.weight"), whole_weight("rnn.bio_mod.w_hh.sub_weight_3.weight")
    ('fc.weight', 'rnn.w_hh')
    """
    found = _SUB_WEIGHT.fullmatch(parameter_path)
    return parameter_path if found is None else f"{found[1]}{found[2] or 'weight'}"


def fold_behind(weight: Any) -> Node | None:
    """Return the node that folds a weight that a layer reads, None where it is not folded."""
    return weight if isinstance(weight, Node) and weight.target is fold_weight else None


@cached_on_graph
def named_parameters(graph_module: GraphModule) -> Mapping[str, tuple[str, nn.Parameter]]:
    """Return the parameters of a model by every path, each with the first path that it goes by."""
    first_path: dict[int, str] = {}
    return {
        path: (first_path.setdefault(id(parameter), path), parameter)
        for path, parameter in graph_module.named_parameters(remove_duplicate=False)
    }


# what keeps passes from a weight


def weight_blocker(weight: Tensor) -> str | None:
    """Return why nothing computes with a weight's values, None if they are numbers that can be trained."""
    kind = type(weight)
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not kind.__module__.startswith(
        MODULES_OF_TENSORS
    ):
        return f"its weight is a {kind.__name__}, which only the library that it comes from computes with"
    if weight.layout is not torch.strided:
        return f"its weight is sparse ({weight.layout})"
    if weight.numel() == 0:
        return f"it has no weights: their shape is {tuple(weight.shape)}"
    is_tiny = weight.is_floating_point() and weight.element_size() == 1
    if is_tiny or not (weight.is_floating_point() or weight.is_complex()):
        return f"its weight is of type {weight.dtype}, in which nothing is trained"
    return None


def sign_blocker(weight: Tensor) -> str | None:
    """Return why a weight can have no sign, None if it can."""
    return "its weight is complex, and only real numbers have a sign" if weight.is_complex() else None


# reads that are no layer's


def slot_of_reads(name: str, source: Node, readers: list[Node]) -> ReadSlot | None:
    """Return the place of those reads that take more than a parameter's size or type, None if none do."""
    taken = tuple(reader for reader in readers if not queries_metadata(reader))
    return ReadSlot(name, "direct", source=source, readers=taken) if taken else None


def read_blocker(parameter: nn.Parameter, slot: ReadSlot) -> str | None:
    """Return why the gradient cannot be scaled, None if it can."""
    for reader in slot.readers:
        if slot.source in changed_in_place(reader):
            return f"{reader.name!r} changes it in place"
    return None
