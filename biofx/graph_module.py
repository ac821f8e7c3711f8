"""The rewritten model: a ``torch.fx.GraphModule`` that stays as close to the original as one can."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node, Tracer

from biofx.errors import CheckpointError, InputError
from biofx.graph_records import pack, unpack
from biofx.plasticity.model_rules import apply_rule, expanded_weights, exposed_rules

_OWN_TO_GRAPH_MODULES = frozenset({"_graph", "_code", "_tracer_cls", "_tracer_extras"})


class BioGraphModule(GraphModule):
    """A graph module that keeps what a plain one drops.

    The whole module tree stays in its order, used by the graph or not, and with it state-dict keys,
    parameter order, persistence of buffers, the model's own hooks and attributes. Copies and pickles carry
    the graph itself, not its code, so nothing is traced a second time and no node changes its name.
    """

    @classmethod
    def from_root(cls, root: nn.Module, graph: Graph, class_name: str | None = None) -> BioGraphModule:
        """Take over everything ``root`` holds (without copying it) and compute with ``graph``."""
        made = cls(nn.Module(), Graph(), class_name or type(root).__name__)
        kept = {name: value for name, value in vars(root).items() if name not in _OWN_TO_GRAPH_MODULES}
        vars(made).update(kept)
        graph._tracer_cls = Tracer  # stock pickling traces again, and must be able to make one
        made.graph = graph
        return made

    @classmethod
    def copy_of(cls, graph_module: GraphModule, memo: dict[int, Any] | None = None) -> BioGraphModule:
        """Return an independent copy of any graph module.

        Raises:
            InputError: the module holds something that cannot be copied.
        """
        memo = {} if memo is None else memo
        own = {name: value for name, value in vars(graph_module).items() if name != "_graph"}
        root = nn.Module()
        memo[id(graph_module)] = made = cls(root, Graph(), type(graph_module).__name__)
        try:
            vars(root).update(copy.deepcopy(own, memo))
        except RuntimeError as error:
            raise InputError(f"expected a model that can be copied: {error}") from error
        vars(made).update(
            {name: value for name, value in vars(root).items() if name not in _OWN_TO_GRAPH_MODULES}
        )
        made.graph = _copy_graph(graph_module.graph)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> BioGraphModule:
        return BioGraphModule.copy_of(self, memo)

    def __copy__(self) -> BioGraphModule:
        return BioGraphModule.from_root(self, _copy_graph(self.graph), type(self).__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        # the content goes in as state, after the object is known: it may refer back to the object
        state = {name: value for name, value in vars(self).items() if name not in _OWN_TO_GRAPH_MODULES}
        return _empty, (type(self).__name__,), (state, pack(self.graph))

    def __setstate__(self, packed: tuple[dict[str, Any], tuple[Any, ...]]) -> None:
        state, graph = packed
        vars(self).update(state)
        self.graph = unpack(graph)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state as any module does.

        Raises:
            CheckpointError: it is the state of a model with half as many units, as the original has after
                ``expand-units``; nothing is changed then.
        """
        for path, weight in expanded_weights(self).items():
            given = state_dict.get(path)
            if given is not None and given.shape != weight.shape:
                raise CheckpointError(
                    f"{path!r}: expected shape {tuple(weight.shape)}, in which each unit is an excitatory "
                    f"and an inhibitory one (dales_method='expand'), found {tuple(given.shape)}; load a "
                    "checkpoint of the original into the original, and transform that"
                )
        return super().load_state_dict(state_dict, strict, assign)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not name.startswith("_") and name in exposed_rules(self):
                return functools.partial(apply_rule, self, name)
            raise


def _copy_graph(graph: Graph) -> Graph:
    copied = Graph(tracer_cls=graph._tracer_cls)
    copied._codegen = copy.deepcopy(graph._codegen)
    mapping: dict[Node, Node] = {}
    for node in graph.nodes:
        mapping[node] = copied.node_copy(node, lambda source: mapping[source])
    return copied


def _empty(class_name: str) -> BioGraphModule:
    return BioGraphModule(nn.Module(), Graph(), class_name)
