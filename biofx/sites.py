"""Weight sites: the places in a graph where a layer's weight meets its input.

A site is either a call of a layer module (``call_module fc``) or, once lowered, a call of the layer's
function on a visible weight expression (``linear(x, scale_gradient(fc.weight, …), fc.bias)``). Code that a
user wrote in the second form is a site like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from biofx import ops
from biofx.layer_kinds import KIND_OF_FUNCTION, LayerKind, kind_of
from biofx.region_use import RegionUse
from biofx.regions import whole_graph

WEIGHT_OPERATORS: frozenset[Callable[..., Any]] = frozenset({ops.constrain_sign, ops.scale_gradient})
"""What may stand between a parameter and the layer that uses it."""


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
    obstacle: str | None
    """Why the weight cannot be made visible, or None."""

    @property
    def layer(self) -> str:
        """Path of the module that owns the weight, empty for the model itself."""
        return self.parameter_path.rpartition(".")[0]

    @property
    def weight_node(self) -> Node | None:
        """The weight expression the site reads, None while the layer module still hides it."""
        if self.node.op == "call_module":
            return None
        weight = weight_argument(self.node)
        return weight if isinstance(weight, Node) else None

    @property
    def operators(self) -> list[Node]:
        """The operators on the way from the parameter to the site, innermost first."""
        found = []
        node = self.weight_node
        while node is not None and node.target in WEIGHT_OPERATORS:
            found.append(node)
            node = node.args[0] if isinstance(node.args[0], Node) else None
        return found[::-1]

    @property
    def output_channels(self) -> int:
        """Channels of the layer's output, a count."""
        shape = self.parameter.shape
        return shape[1] * self.groups if self.kind.transposed else shape[0]

    @property
    def input_channels(self) -> int:
        """Channels of the layer's input (its presynaptic units), a count."""
        shape = self.parameter.shape
        return shape[0] if self.kind.transposed else shape[1] * self.groups

    def has(self, operator: Callable[..., Any]) -> bool:
        """Whether the weight already passes through ``operator`` on its way here."""
        return any(node.target is operator for node in self.operators)


@dataclass(frozen=True)
class Bystander:
    """A layer that a pass would like to rewrite and cannot reach."""

    layer: str
    node: Node | None
    reason: str


@dataclass(frozen=True)
class Sites:
    """Everything in a model that has, or should have, a weight site."""

    found: list[WeightSite]
    """In execution order."""
    bystanders: list[Bystander]

    def weights(self) -> list[Weight]:
        """Return the weights, in order of their first use, each with all its sites."""
        uses: dict[int, list[WeightSite]] = {}
        for site in self.found:
            uses.setdefault(id(site.parameter), []).append(site)
        last = max(1, len(uses) - 1)
        return [Weight(tuple(sites), place / last) for place, sites in enumerate(uses.values())]


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


def find_sites(graph_module: GraphModule) -> Sites:
    """Return every weight site of a graph, and every layer that has none with the reason."""
    found: list[WeightSite] = []
    bystanders: list[Bystander] = []
    survey = _Survey(graph_module)
    for node in survey.graph.nodes:
        if survey.use.is_call_of_a_region(node):
            continue
        if node.op == "call_module":
            site = survey.module_site(node)
            if site is not None:
                found.append(site)
            else:
                bystanders += survey.layers_inside(node)
        elif node.op == "call_function" and node.target in KIND_OF_FUNCTION:
            entry = survey.function_site(node)
            if isinstance(entry, WeightSite):
                found.append(entry)
            else:
                bystanders.append(entry)
    seen = {site.layer for site in found} | {bystander.layer for bystander in bystanders}
    visible = {site.layer for site in found}
    bystanders = [entry for entry in bystanders if entry.layer not in visible]
    seen |= {str(node.target) for node in survey.graph.nodes if node.op == "call_module"}
    seen |= {_innermost_path(site.node) for site in found}  # of a tied weight, the layer that is called
    bystanders += [
        Bystander(path, None, "never called in the forward")
        for path, module in graph_module.named_modules()
        if kind_of(module) is not None and path not in seen and not survey.is_used(path)
    ]
    return Sites(found, bystanders)


def weight_argument(node: Node) -> Any:
    """Return the weight that a lowered site reads."""
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")


def parameter_behind(node: Any) -> Node | None:
    """Return the ``get_attr`` node at the root of a weight expression, None if it is something else."""
    while isinstance(node, Node) and node.op == "call_function" and node.target in WEIGHT_OPERATORS:
        node = node.args[0]
    return node if isinstance(node, Node) and node.op == "get_attr" else None


def _computed_weight(module: Any, kind: LayerKind) -> nn.Parameter:
    """Return something of a weight's shape; to compute the weight itself would be a step of spectral norm."""
    if kind.kernel_axes == 0:
        shape = (module.out_features, module.in_features)
    else:
        ends = (module.out_channels, module.in_channels)
        first, second = ends[::-1] if kind.transposed else ends
        shape = (first, second // module.groups, *module.kernel_size)
    return nn.Parameter(torch.zeros(()).expand(shape))


class _Survey:
    """One walk over a graph, with the tables it needs built once."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph = whole_graph(graph_module)
        self.use = RegionUse(graph_module, self.graph)
        self._modules = dict(graph_module.named_modules(remove_duplicate=False))
        first_path: dict[int, str] = {}
        self._parameters: dict[str, tuple[str, nn.Parameter]] = {}
        for path, parameter in graph_module.named_parameters(remove_duplicate=False):
            first_path.setdefault(id(parameter), path)
            self._parameters[path] = (first_path[id(parameter)], parameter)
        self._outside = self._uses_outside_sites()

    def module_site(self, node: Node) -> WeightSite | None:
        path = str(node.target)
        module = self._modules[path]
        kind = kind_of(module)
        if kind is None:
            return None
        named = self._parameters.get(f"{path}.weight")
        if named is None:
            named = (f"{path}.weight", _computed_weight(module, kind))
        else:
            named = (self.use.path_for(node, f"{path}.weight", named[0]), named[1])
        obstacle = _obstacle_to_lowering(node, module, kind) or self._obstacle(node, named[1])
        groups: Any = getattr(module, "groups", 1)
        return WeightSite(node, kind, *named, groups=groups, obstacle=obstacle)

    def function_site(self, node: Node) -> WeightSite | Bystander:
        kind = KIND_OF_FUNCTION[node.target]
        root = parameter_behind(weight_argument(node))
        named = self._parameters.get(str(root.target)) if root is not None else None
        if root is None or named is None:
            reason = f"its weight is {weight_argument(node)}, computed in the graph, not a parameter"
            return Bystander(_innermost_path(node), node, reason)
        named = (self.use.path_for(node, str(root.target), named[0]), named[1])
        obstacle = self._obstacle(node, named[1])
        return WeightSite(node, kind, *named, groups=_groups_of(node, kind), obstacle=obstacle)

    def _obstacle(self, node: Node, parameter: nn.Parameter) -> str | None:
        return self._outside.get(id(parameter)) or self.use.obstacle(node, parameter)

    def layers_inside(self, node: Node) -> list[Bystander]:
        path = str(node.target)
        opaque = self._modules[path]
        reason = f"inside {path!r} ({type(opaque).__name__}), which the graph calls as a whole"
        return [
            Bystander(f"{path}.{inner}", node, reason)
            for inner, module in opaque.named_modules()
            if inner and kind_of(module) is not None
        ]

    def is_used(self, path: str) -> bool:
        return any(
            f"{path}.{name}" in self._used for name, _ in self._modules[path].named_parameters(recurse=False)
        )

    def _uses_outside_sites(self) -> dict[int, str]:
        """Map each parameter that something other than a site reads to words about that reader."""
        outside: dict[int, str] = {}
        self._used: set[str] = set()
        for node in self.graph.nodes:
            if node.op == "call_module" and kind_of(self._modules[str(node.target)]) is None:
                for parameter in self._modules[str(node.target)].parameters():
                    if self.use.is_apart(parameter):
                        continue
                    outside.setdefault(id(parameter), _reader(node, self._modules[str(node.target)]))
            elif node.op == "get_attr" and node.target in self._parameters:
                self._used.add(str(node.target))
                for reader in _readers_besides_sites(node):
                    outside.setdefault(id(self._parameters[str(node.target)][1]), _reader(reader))
        return outside


def _readers_besides_sites(node: Node) -> Iterator[Node]:
    for user in node.users:
        if user.op == "call_function" and user.target in WEIGHT_OPERATORS:
            yield from _readers_besides_sites(user)
        elif not (user.target in KIND_OF_FUNCTION and weight_argument(user) is node):
            yield user


def _reader(node: Node, module: nn.Module | None = None) -> str:
    described = f" ({type(module).__name__})" if module is not None else ""
    return f"its weight is also read by {node.name!r}{described}, which would not follow"


def _innermost_path(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""


def _groups_of(node: Node, kind: LayerKind) -> int:
    """Return ``groups`` of a functional convolution: its seventh argument, transposed or not."""
    if kind.kernel_axes == 0:
        return 1
    groups: Any = node.args[6] if len(node.args) > 6 else node.kwargs.get("groups", 1)
    return int(groups)


_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)


def hooks_of(module: nn.Module) -> list[str]:
    """Return the kinds of hooks registered on a module, readable."""
    return [name.strip("_").replace("_", " ") for name in _HOOKS if getattr(module, name)]


def _obstacle_to_lowering(node: Node, module: nn.Module, kind: LayerKind) -> str | None:
    """Return why a layer's call cannot be replaced by its function on a visible weight."""
    if hooks := hooks_of(module):
        return f"it has {' and '.join(hooks)}, which would no longer run"
    if "weight" not in module._parameters:
        return "its weight is computed by a parametrization, not a parameter"
    overridden: Iterable[str] = ("forward", "_conv_forward")
    if any(name in vars(module) for name in overridden):
        return "its forward was replaced on the instance"
    if any(getattr(type(module), m, None) is not getattr(kind.module_type, m, None) for m in overridden):
        return f"{type(module).__name__} has a forward of its own, not {kind.name}'s"
    if len(node.args) + len(node.kwargs) != 1:
        return "it is called with more than its input (output_size), which its function does not take"
    return None
