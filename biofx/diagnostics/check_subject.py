"""What an audit looks at: a model's graph, weights and plasticity states, walked through once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from biofx.graph.joined_graph import whole_view
from biofx.graph.regions import region_paths
from biofx.layers import dense_kind_of
from biofx.layers.constant_part import ConstantPart, WeightUse, weight_uses
from biofx.plasticity.bio_module import BioModule


@dataclass(frozen=True)
class Placed:
    """A plasticity state where it was found in the model."""

    place: str
    """Path of the state, e.g. ``layer1.conv.bio_mod``."""
    layer: str
    """Path of the layer that it sits in."""
    state: BioModule


@dataclass(frozen=True)
class Subject:
    """A model under audit."""

    graph_module: GraphModule
    """The model; its regions are shown as parts of one graph."""
    graphs: Mapping[str, GraphModule]
    """The modules that run a graph, the model itself and its regions, by path."""
    parameters: dict[int, tuple[str, nn.Parameter]]
    """The parameters by id, each with the first path it goes by."""
    placed: tuple[Placed, ...]
    """Every place where a plasticity state sits; the state of a tied weight may sit in several."""
    layers: tuple[str, ...]
    """Paths of the modules with parameters or a plasticity state, in the model's order."""

    @classmethod
    def of(cls, graph_module: GraphModule) -> Subject:
        """Look through the modules of a model."""
        parameters: dict[int, tuple[str, nn.Parameter]] = {}
        for path, parameter in graph_module.named_parameters(remove_duplicate=False):
            parameters.setdefault(id(parameter), (path, parameter))
        placed: list[Placed] = []
        layers: dict[str, None] = {}
        for path, module in graph_module.named_modules(remove_duplicate=False):
            if isinstance(module, BioModule):
                placed.append(Placed(path, layer_around(path), module))
            elif module._parameters or dense_kind_of(module) is not None or "bio_mod" in module._modules:
                layers.setdefault(path)
        regions = ((path, graph_module.get_submodule(path)) for path in region_paths(graph_module))
        graphs = {"": graph_module, **{path: m for path, m in regions if isinstance(m, GraphModule)}}
        return cls(whole_view(graph_module), graphs, parameters, tuple(placed), tuple(layers))

    def states(self) -> list[Placed]:
        """Return each state that belongs to a layer once, where it was found first."""
        first: dict[int, Placed] = {}
        for placed in self.placed:
            if placed.state.is_linked:
                first.setdefault(id(placed.state), placed)
        return list(first.values())

    def path_of(self, parameter: nn.Parameter, otherwise: str) -> str:
        """Return the first path a parameter goes by."""
        return self.parameters.get(id(parameter), (otherwise, parameter))[0]


@dataclass(frozen=True)
class Uses:
    """The weights of a model on their way through its graph."""

    constants: ConstantPart
    of_parameter: dict[int, list[WeightUse]]
    """The uses of each parameter, by the parameter's id."""
    of_constraint: dict[Node, list[WeightUse]]
    """The uses that pass through each sign constraint."""

    @classmethod
    def of(cls, graph_module: GraphModule) -> Uses:
        """Walk through a graph."""
        constants = ConstantPart(graph_module)
        found = cls(constants, {}, {})
        for use in weight_uses(constants):
            found.of_parameter.setdefault(id(use.parameter), []).append(use)
            for node in use.constraints:
                found.of_constraint.setdefault(node, []).append(use)
        return found


def layer_around(place: str) -> str:
    """Return the path of the layer in which a state sits.

    >>> layer_around("layer1.conv.bio_mod"), layer_around("bio_mod.projection")
    ('layer1.conv', '')
    """
    parts = place.split(".")
    return ".".join(parts[: parts.index("bio_mod")]) if "bio_mod" in parts else place.rpartition(".")[0]


def owner_of(path: str) -> str:
    """Return the path of the module that holds a parameter or buffer; of a state's buffer, the layer."""
    owner = path.rpartition(".")[0]
    return layer_around(owner) if "bio_mod" in owner.split(".") else owner
