"""The state of a model that is compiled: one graph module that holds it, whatever graphs the compiler makes.

A companion holds the model's own parameters and, beside them, rates, signs and masks. Each graph that reads
a weight which no earlier graph read adds to it; later ones of the same weights (another batch size,
``eval()``) take their state from it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from biofx.compiling.named_graphs import NamedGraph
from biofx.errors import BiofxWarning, OptionError
from biofx.model.called_again import lines_as_transformed
from biofx.model.graph_module import BioGraphModule
from biofx.operators.mask_ops import mask_weight
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.model_states import bio_module_path, kept_state
from biofx.rewriting.record import ATTRIBUTE, record_of


@dataclass
class Companion:
    """The companion of one model."""

    module: BioGraphModule
    """A graph module with the model's parameters and their state."""
    was_given_out: bool = False
    parameters: set[str] = field(default_factory=set)
    """Paths of the parameters that its graphs read."""

    def find(self, path: str) -> Any:
        """Return what the model or its state has at a path."""
        owner, _, name = path.rpartition(".")
        return getattr(self.module.get_submodule(owner), name)

    def follow_parameters(self, model: nn.Module) -> None:
        """Hold the parameters and buffers that the model holds by now."""
        for path, module in model.named_modules(remove_duplicate=False):
            mine = self._module_at(path)
            for held, own in ((module._parameters, "_parameters"), (module._buffers, "_buffers")):
                kept = getattr(mine, own) if mine is not None else {}
                for name in held.keys() & kept.keys():
                    kept[name] = held[name]

    def _module_at(self, path: str) -> nn.Module | None:
        try:
            return self.module.get_submodule(path)
        except AttributeError:
            return None


def parameters_read(graph_module: BioGraphModule) -> set[str]:
    """Return the paths of the parameters that a graph reads, by itself or through its layers."""
    found: set[str] = set()
    known = {path for path, _ in graph_module.named_parameters(remove_duplicate=False)}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            found |= known & {str(node.target)}
        elif node.op == "call_module":
            called = graph_module.get_submodule(str(node.target))
            found |= {f"{node.target}.{name}" for name, _ in called.named_parameters()}
    return found


def take_initial_values(
    made: BioGraphModule, model: nn.Module, known: set[str], *, initialise: bool
) -> dict[str, Tensor]:
    """Let a rewritten graph hold the model's own parameters again, where passes gave it others.

    Args:
        made: the rewritten graph.
        model: whose parameters they are.
        known: parameters whose values are the user's from now on, since an earlier graph read them.
        initialise: whether the others may be given the values that passes made.

    Returns:
        The values that passes made, by the paths of the parameters.

    Raises:
        OptionError: a pass gave the model parameters of its own or of another shape, or values although
            ``initialise`` is False.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, Tensor] = {}
    for path, parameter in list(made.named_parameters(remove_duplicate=False)):
        if path not in own or parameter.shape != own[path].shape:
            raise OptionError(
                f"expected passes that leave the parameters of {type(model).__name__} as many and as large "
                f"as they are, since its optimizer holds them; found another at {path!r} (sub-weights, or "
                "units that were expanded). Transform the model first and compile the result: "
                "torch.compile(biofx.transform(model, config).graph_module)"
            )
        if parameter is not own[path]:
            owner, _, name = path.rpartition(".")
            made.get_submodule(owner)._parameters[name] = own[path]
            if path not in known and (initialise or not _is_masked_alone(made, path, own[path], parameter)):
                found[path] = parameter.detach()
    if found and not initialise:
        shown = ", ".join(map(repr, list(found)[:3])) + (", …" if len(found) > 3 else "")
        raise OptionError(
            f"the passes give {len(found)} parameters ({shown}) other values to start from, and compiling a "
            "model leaves its parameters as they are. Say biofx.backend(config, initialise=True) to have "
            "them written at the first call, when the weights are fresh; or keep those there are: "
            "dales_initialisation='keep', weight_mask_initialisation='keep'"
        )
    return found


def _is_masked_alone(made: nn.Module, path: str, own: nn.Parameter, given: nn.Parameter) -> bool:
    """Whether values differ from a parameter's own only where no connection exists, which the graph masks."""
    state = kept_state(made, path)
    mask = None if state is None else state.connection_mask
    return mask is not None and torch.equal(mask_weight(own.detach(), mask), given.detach())


@torch.no_grad()
def write_values(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Write values to parameters in place."""
    for path, value in values.items():
        model.get_parameter(path).data.copy_(value)


def extended(companion: Companion, named: NamedGraph) -> None:
    """Add to a companion what another graph of the same model has that it does not."""
    made = named.module
    new = parameters_read(made) - companion.parameters
    for path, state in list(_states(made)):
        _adopt_state(companion.module, path, state)
    if not new:
        return
    if companion.was_given_out:
        warnings.warn(
            f"a graph that was compiled later reads parameters that the companion did not have "
            f"({', '.join(map(repr, sorted(new)[:3]))}); an attachment that was made before does not act on "
            "them. Call the model once in each mode before biofx.attach",
            BiofxWarning,
            stacklevel=2,
        )
    for path, module in list(made.named_modules()):
        is_layer = path and type(module) is not nn.Module and not isinstance(module, BioModule)
        if is_layer and not any(isinstance(part, BioModule) for part in _on_the_way(made, path)):
            _adopt_layer(companion.module, path, module)
    _append_graph(companion.module, made)
    companion.parameters |= new
    record: Any = record_of(companion.module)
    vars(companion.module)[ATTRIBUTE] = dataclasses.replace(
        record, graph=lines_as_transformed(companion.module)
    )


def _states(made: nn.Module) -> Iterator[tuple[str, BioModule]]:
    for module in made.modules():
        if isinstance(module, BioModule) and module.is_linked:
            yield bio_module_path(module.path), module


def _on_the_way(root: nn.Module, path: str) -> Iterator[nn.Module]:
    parts = path.split(".")
    for end in range(1, len(parts)):
        yield root.get_submodule(".".join(parts[:end]))


def _adopt_state(target: nn.Module, path: str, state: BioModule) -> None:
    """Put a state at its path, or, where there is one, give it the buffers that it lacks."""
    owner, (*places, name) = target, path.split(".")
    for place in places:
        if place not in owner._modules:
            owner.add_module(place, BioModule() if place == "bio_mod" else nn.Module())
        owner = owner.get_submodule(place)
    present = owner._modules.get(name)
    if not isinstance(present, BioModule) or not present.is_linked:
        owner.add_module(name, state)
        state.link(target.get_submodule(state.path.rpartition(".")[0]))
        return
    for buffer, value in state._buffers.items():
        if value is not None and present._buffers.get(buffer) is None:
            setattr(present, buffer, value)


def _adopt_layer(target: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer at its path, with the states that are there, unless its like is there already."""
    owner_path, _, name = path.rpartition(".")
    owner = target.get_submodule(owner_path) if owner_path else target
    present = owner._modules.get(name)
    if type(present) is type(layer):
        return
    if present is not None:
        layer._modules.update(present._modules)
    owner._modules[name] = layer
    for module in layer.modules():
        if isinstance(module, BioModule) and module.is_linked:
            module.link(target.get_submodule(module.path.rpartition(".")[0]))


def _append_graph(target: BioGraphModule, made: BioGraphModule) -> None:
    """Let a graph compute what another computes, too: its inputs and outputs follow the others."""
    graph = target.graph
    (output,) = graph.find_nodes(op="output")
    copied: dict[Node, Node] = {}
    inputs = graph.find_nodes(op="placeholder")
    reads = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    result: Any = None
    for node in made.graph.nodes:
        if node.op == "output":
            result = torch.fx.node.map_arg(node.args[0], lambda entry: copied[entry])
        elif node.op == "get_attr" and str(node.target) in reads:
            read = copied[node] = reads[str(node.target)]
            first.prepend(read)
        else:
            with graph.inserting_before(first if node.op in ("placeholder", "get_attr") else output):
                copied[node] = graph.node_copy(node, lambda entry: copied[entry])
            if node.op == "placeholder":
                taken = {str(entry.target) for entry in inputs}
                copied[node].target = copied[node].name if node.target in taken else node.target
    output.args = ((output.args[0], result),)
    graph.lint()
    target.recompile()
