"""Where everything is that a graph took over, laid out flat, so that a look at it costs next to nothing."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import is_parametrized

from biofx.model.graph_places import Places, module_at
from biofx.model.taken_in import STATE, Row, Taken, own_class, same_for_graph, where_taken
from biofx.plasticity.ranks import is_fully_sharded


@dataclass(frozen=True)
class Standing:
    """What stood in the tree when it was last compared with what the graph took over.

    Everything is compared by identity or size, and by loops that Python itself runs.
    """

    root: dict[str, Any]
    tables: tuple[tuple[Callable[[Any], Any], dict[str, Any]], ...]
    """Tables of modules, each with what gets some of its entries."""
    values: list[Any]
    """Those entries."""
    sized: tuple[dict[str, Any], ...]
    """Tables to which nothing may be added: of containers, and of attributes, which hide methods."""
    sizes: list[int]
    modules: tuple[nn.Module, ...]
    kinds: tuple[type, ...]
    classes: tuple[type, ...]
    names: tuple[str, ...]
    methods: tuple[Any, ...]
    """Methods of these classes, by these names."""
    hooks: tuple[dict[int, Any], ...]
    twice: tuple[tuple[dict[str, Any], ...], tuple[str, ...], tuple[dict[str, Any], ...], tuple[str, ...]]
    """Tables and names of what must be the same as what others hold, and those of the others."""
    operands: tuple[tuple[dict[str, Any], ...], tuple[str, ...]]
    """Tables and names of parameters that go through operators of ours."""

    @classmethod
    def of(cls, graph_module: GraphModule, places: Places) -> Standing:
        """Return where everything is now."""
        kept: dict[str, Taken] = vars(graph_module)[STATE]
        same = same_for_graph(graph_module, places.used)
        rows: list[Row] = []
        modules: dict[int, nn.Module] = {}
        methods: dict[tuple[type, str], Any] = {}
        sized: list[dict[str, Any]] = []
        hooks: list[dict[int, Any]] = []
        for path in (*places.passed, *places.called):
            rows += _on_the_way(graph_module, path)
        for path in places.passed:
            module: Any = module_at(graph_module, path)
            if kept[path].children is not None:
                sized.append(module._modules)
            if path in places.inline | places.compact:
                modules[id(module)] = module
                rows += where_taken(kept[path], module)
                methods |= {(own_class(module), name): held for name, held in kept[path].methods.items()}
                sized.append(vars(module))
                if path in places.inline - {""} and not is_fully_sharded(
                    module
                ):  # the whole model, and a region, run theirs
                    hooks += [getattr(module, name) for name in _HOOKS]
        tables = _by_table(rows)
        pairs = [(*_holder(graph_module, first), *_holder(graph_module, other)) for first, other in same]
        operands = tuple((table, name) for _, table, name in operands_of(graph_module, places))
        return cls(
            root=graph_module._modules,
            tables=tables,
            values=[get(table) for get, table in tables],
            sized=tuple(sized),
            sizes=list(map(len, sized)),
            modules=tuple(modules.values()),
            kinds=tuple(map(type, modules.values())),
            classes=tuple(kind for kind, _ in methods),
            names=tuple(name for _, name in methods),
            methods=tuple(methods.values()),
            hooks=tuple(hooks),
            twice=tuple(zip(*pairs, strict=True)) if pairs else ((), (), (), ()),
            operands=(tuple(table for table, _ in operands), tuple(name for _, name in operands)),
        )

    def holds(self, graph_module: GraphModule) -> bool:
        """Whether everything is as it was."""
        same = operator.is_
        try:
            return (
                graph_module._modules is self.root
                and [get(table) for get, table in self.tables] == self.values
                and list(map(len, self.sized)) == self.sizes
                and all(map(same, map(type, self.modules), self.kinds))
                and all(map(same, map(getattr, self.classes, self.names), self.methods))
                and not any(self.hooks)
                and all(map(same, map(dict.get, *self.twice[:2]), map(dict.get, *self.twice[2:])))
                and kinds_of_tensors().issuperset(map(type, map(dict.get, *self.operands)))
            )
        except (KeyError, AttributeError):  # something was taken out
            return False


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def operands_of(graph_module: GraphModule, places: Places) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield where parameters are that operators are applied to, and that no parametrization computes."""
    for path in places.operated:
        owner: Any = module_at(graph_module, path.rpartition(".")[0])
        name = path.rpartition(".")[2]
        if not is_parametrized(owner, name) and name in owner._parameters:
            yield path, owner._parameters, name


def _holder(graph_module: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    owner: Any = module_at(graph_module, path.rpartition(".")[0])
    name = path.rpartition(".")[2]
    return (owner._modules if name in owner._modules else owner._parameters), name


def _by_table(rows: list[Row]) -> tuple[tuple[Callable[[Any], Any], dict[str, Any]], ...]:
    tables: dict[int, tuple[dict[str, Any], dict[str, None]]] = {}
    for table, name in rows:
        tables.setdefault(id(table), (table, {}))[1][name] = None
    return tuple((operator.itemgetter(*names), table) for table, names in tables.values())


def _on_the_way(graph_module: nn.Module, path: str) -> Iterator[Row]:
    module: Any = graph_module
    for part in path.split(".") if path else ():
        yield module._modules, part
        module = module._modules[part]


@functools.cache
def kinds_of_tensors() -> frozenset[type]:
    """Return the classes of tensors that operators on weights know: torch's own, sharded or not."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    found: set[type] = {Tensor, nn.Parameter, FakeTensor, FunctionalTensor}
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        found.add(DTensor)
    return frozenset(found)
