"""Make a layer's weight visible, and put operators between the weight and the layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from biofx.errors import PassError
from biofx.graph.contexts import ContextMap
from biofx.graph.regions import begin_region, region_around, region_of_nodes
from biofx.layers.layer_kind import WeightSlot
from biofx.layers.weight_site import WeightSite, named_parameters, whole_weight


class Wrappable(Protocol):
    """A place where a node reads a parameter, behind operators or not."""

    @property
    def node(self) -> Node:
        """The node that reads it."""

    @property
    def parameter_path(self) -> str:
        """Path of the parameter."""

    @property
    def slot(self) -> WeightSlot:
        """Where among the node's arguments."""

    @property
    def weight_node(self) -> Node | None:
        """The expression it reads, None while a module still hides it."""


class Lowering:
    """Lowers the layers of one graph. Nothing else may add or remove ``get_attr`` nodes meanwhile."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = graph_module
        self._first_path = {path: first for path, (first, _) in named_parameters(graph_module).items()}
        graph = graph_module.graph
        self._has_regions = bool(graph.find_nodes(op="call_function", target=begin_region))
        regions = region_of_nodes(graph) if self._has_regions else {}
        # by path, so that looking one up does not go through the graph, which would make it all quadratic
        self._reads = {
            (regions.get(node), str(node.target)): node for node in reversed(graph.find_nodes(op="get_attr"))
        }
        self._settings: dict[tuple[str, str], Node] = {}
        self.contexts = ContextMap(graph_module.graph)

    @functools.cached_property
    def parameters(self) -> Parameters:
        """Who holds the parameters, to replace them."""
        return Parameters(self.graph_module)

    def lower(self, site: WeightSite) -> None:
        """Replace a layer's call by its function on a visible weight: ``fc(x)`` becomes ``linear(x, w, b)``.

        The node keeps its name and its users, the layer module stays in the tree, and the function is the one
        the module calls itself, so the result is equal to the bit. A layer with several weights shows them
        all at once. A site that is lowered already is left alone.

        Raises:
            PassError: the layer cannot be lowered; a pass reports such a site as missed.
        """
        if site.node.op != "call_module":
            return
        if site.lowering_blocker is not None:
            raise PassError(f"{site.node.name!r} cannot be lowered: {site.lowering_blocker}")
        module = self.graph_module.get_submodule(str(site.node.target))
        site.kind.lower(site.node, module, functools.partial(self._read_for, site))

    def _read_for(self, site: WeightSite, name: str) -> Node:
        """Return the node that reads what the called module holds under a name."""
        if not site.kind.takes_a_parametrization:
            return self.read_of(site.node, name)
        if name != "weight":
            return self.read(f"{site.node.target}.{name}", site.node)
        return self._computed(site) if site.is_computed else self.read(site.parameter_path, site.node)

    def _computed(self, site: WeightSite) -> Node:
        """Insert nodes that read a layer's weight, which its parametrization then computes."""
        node = site.node
        path, named = site.parameter_path, site.parameter_path.replace(".", "_")
        layer = self.read(site.layer, node, f"{named.removesuffix('_weight')}_layer")
        with node.graph.inserting_before(node):
            weight = node.graph.create_node(
                "call_function", getattr, (layer, path.rpartition(".")[2]), name=named
            )
        weight.meta = dict(layer.meta)
        return weight

    def wrap_weight(
        self,
        sites: Sequence[Wrappable],
        operator: Callable[..., Any],
        argument: tuple[str, str] | Callable[[Node, str], Node | tuple[Node, ...]] | None,
        suffix: str,
        **options: Any,
    ) -> None:
        """Insert ``operator(weight, argument, **options)`` between a weight and some sites that use it.

        Sites that read the same expression still share one: a weight that is used twice is wrapped once.
        Only where some of them are in a context (``torch.no_grad``, …) has each context one of its own, since
        what is computed there has no gradient, and none outside.

        Args:
            sites: lowered sites of one parameter.
            operator: a weight operator.
            argument: its second argument: path of a buffer, and how the name of the node that reads it ends;
                or what makes the node, or nodes for further arguments, given the weight and how names begin;
                None where there is none.
            suffix: how the name of the new node ends; both begin with the layer's.
            **options: its keyword arguments, constants or nodes.
        """
        wrapped: dict[tuple[Node, Node | None], Node] = {}
        arguments: dict[Node, tuple[Node, ...]] = {}
        weights = [(site, site.weight_node) for site in sites]
        for site, weight in weights:
            if weight is None:
                raise PassError(f"{site.node.name!r} must be lowered before its weight can be wrapped")
            stem = node_stem(site.parameter_path)
            if weight not in arguments:
                read = [weight]
                if isinstance(argument, tuple):
                    read.append(self.read(argument[0], weight.next, f"{stem}_{argument[1]}"))
                elif argument is not None:
                    made = argument(weight, stem)
                    read += made if isinstance(made, tuple) else (made,)
                arguments[weight] = tuple(read)
            reader = site.slot.reader(site.node)
            key = weight, self.contexts.around(reader)
            if key not in wrapped:
                given = [value for value in options.values() if isinstance(value, Node)]
                place = self.contexts.place_for(reader, (*arguments[weight], *given))
                with weight.graph.inserting_before(place):
                    new = weight.graph.create_node(
                        "call_function", operator, arguments[weight], options, f"{stem}_{suffix}"
                    )
                new.meta = dict(weight.meta)
                wrapped[key] = new
            site.slot.write(site.node, wrapped[key])

    def read_of(self, node: Node, name: str) -> Node:
        """Return the ``get_attr`` node for what the module that ``node`` calls has under a name."""
        path = f"{node.target}.{name}"
        return self.read(self._first_path.get(path, path), node)

    def setting_of(self, node: Node, name: str) -> Node:
        """Return the node that reads a setting of the module that ``node`` calls, which may be None.

        ``torch.fx`` takes a ``get_attr`` of None for one of nothing, so ``getattr`` is called.
        """
        path = str(node.target)
        if (path, name) not in self._settings:
            named = path.replace(".", "_")
            layer = self.read(path, node, f"{named}_layer")
            with node.graph.inserting_before(node):
                made = node.graph.create_node("call_function", getattr, (layer, name), name=f"{named}_{name}")
            made.meta = dict(layer.meta)
            self._settings[path, name] = made
        found = self._settings[path, name]
        if node < found:
            node.prepend(found)
            self.read(path, found)
        return found

    def read(self, path: str, before: Node, name: str | None = None) -> Node:
        """Return the one ``get_attr`` node for ``path``, made or moved to stand ahead of ``before``.

        In a joined graph each region has one of its own.
        """
        key = (region_around(before) if self._has_regions else None), path
        existing = self._reads.get(key)
        if existing is None:
            with before.graph.inserting_before(before):
                existing = before.graph.create_node("get_attr", path, name=name or path.replace(".", "_"))
            existing.meta = {key: value for key, value in before.meta.items() if key == "nn_module_stack"}
            self._reads[key] = existing
        elif before < existing:
            before.prepend(existing)
        return existing


class Parameters:
    """The modules that hold each parameter of a model, to replace parameters that it may share with another.

    Args:
        root: the model; its parameters must not be replaced by other means in the meantime.
    """

    def __init__(self, root: nn.Module) -> None:
        self._holders: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in root.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._holders.setdefault(id(parameter), []).append((module, name))

    def is_shared(self, parameter: nn.Parameter) -> bool:
        """Whether the model holds a parameter in several places."""
        return len(self._holders[id(parameter)]) > 1

    @torch.no_grad()
    def replace(self, old: nn.Parameter, values: Tensor) -> nn.Parameter:
        """Replace a parameter wherever the model holds it; the old one is not changed.

        Args:
            old: a parameter of the model.
            values: any shape; moved to the old one's dtype and device.

        Returns:
            The new parameter; it requires a gradient if the old one does.
        """
        new = nn.Parameter(values.detach().to(old).clone(), requires_grad=old.requires_grad)
        vars(new).update(vars(old))
        holders = self._holders.pop(id(old))
        for module, name in holders:
            module._parameters[name] = new
        self._holders[id(new)] = holders
        return new


def node_stem(parameter_path: str) -> str:
    """Return how the names of nodes begin that are made for a weight.

    >>> node_stem("block.fc.weight"), node_stem("block.fc.bio_mod.sub_weight_2.weight")
    ('block_fc', 'block_fc_sub_weight_2')
    """
    stem = parameter_path.removesuffix(".weight")
    if whole_weight(parameter_path) != parameter_path:
        stem = stem.replace("bio_mod.", "", 1)
    return stem.replace(".", "_")
