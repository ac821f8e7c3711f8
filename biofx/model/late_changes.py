"""Changes of modules after their capture that a graph would not follow: they are told of, and never nothing.

A graph has inline what some of its modules do, and does not call them. What each of them was then is kept
with the graph (:class:`biofx.model.taken_in.Taken`) and compared with what stands in its place now.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import is_parametrized

from biofx.errors import CaptureError, InputError
from biofx.layers.obstacles import hooks_of
from biofx.model.called_again import Become, call_again, find_again
from biofx.model.graph_places import Places, module_at
from biofx.model.taken_in import STATE, Row, Taken, own_class, where_taken
from biofx.plasticity.sharded_model import is_fully_sharded

_REMEDY = "change the model before it is transformed, and transform it anew, or change what biofx.deploy returns"


def following_changes(forward: Any, become: Become) -> Any:
    """Return a forward of a graph module that first looks whether all is as it was when it was captured.

    It has the globals of the one it was given, where ``torch.jit.script`` looks names up.
    """

    @functools.wraps(forward)
    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_compiling() and look(self, become):
            return type(self).forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    is_compiling, look = torch.compiler.is_compiling, follow_late_changes
    if not isinstance(forward, FunctionType):
        return followed
    made = FunctionType(
        followed.__code__, forward.__globals__, forward.__name__, None, followed.__closure__
    )
    return functools.update_wrapper(made, forward)


def remember_modules(graph_module: GraphModule) -> Places:
    """Keep, with a graph module, what its graph takes over from the modules that it does not call."""
    places = Places.of(graph_module)
    kept: dict[str, Taken] = vars(graph_module).setdefault(STATE, {})
    for path in places.passed:
        module = module_at(graph_module, path)
        if path not in kept and module is not None:
            kept[path] = Taken.of(module)
    return places


def follow_late_changes(graph_module: Any, become: Become) -> bool:
    """Look whether the modules of a graph are what they were; return whether the graph is another one now.

    Raises:
        CaptureError: one of them is not, and the graph would go on doing what it did.
        InputError: one of them has a hook, which would never run.
    """
    kind = type(graph_module)
    standing: _Standing | None = kind._standing
    if standing is not None and standing.holds(graph_module):
        return False
    changed = False
    while (found := _first_difference(graph_module)) is not None:
        path, message = found
        if not call_again(graph_module, path, become) and not find_again(graph_module):
            raise CaptureError(f"{message}. The graph has what it did inline, and does not call it: {_REMEDY}")
        changed = True
    kind._standing = _Standing.of(graph_module)
    return changed


def _first_difference(graph_module: GraphModule) -> tuple[str, str] | None:
    kept: dict[str, Taken] = vars(graph_module)[STATE]
    places: Places = type(graph_module)._places  # type: ignore[attr-defined]
    for path in places.passed:
        module, named = module_at(graph_module, path), f"module {path!r}" if path else "the model"
        if module is None:
            return path, f"{named} is no longer there"
        is_run = path in places.inline
        difference = kept[path].difference(module, is_run=is_run, is_root=not path)
        if difference is not None:
            return path, f"{named} was changed since the model was captured: {difference}"
        if is_run and path and not is_fully_sharded(module):
            _refuse_hooks(module, path)
    for path in places.called:
        if module_at(graph_module, path) is None:
            return path, f"module {path!r}, which the graph calls, is no longer there"
    for path in places.read:
        owner_path, _, name = path.rpartition(".")
        owner = module_at(graph_module, owner_path)
        if owner is None or not _has(owner, name):
            return owner_path, f"module {owner_path!r} has no {name!r} any more, which the graph reads"
    for path, table, name in _operands(graph_module, places):
        if type(table.get(name)) not in _kinds():
            return path.rpartition(".")[0], (
                f"{path!r} is a {type(table.get(name)).__name__} now, and the graph does something to it "
                "before it is used"
            )
    return None


def _refuse_hooks(module: nn.Module, path: str) -> None:
    if hooks := hooks_of(module):
        raise InputError(
            f"module {path!r} ({type(module).__name__}) has {' and '.join(hooks)}, which "
            "would never run: the graph has what the module does, and does not call it. Take them off, "
            f"or register them on the model before it is transformed, with opaque=[{path!r}]"
        )


@dataclass(frozen=True)
class _Standing:
    """Where all is that must stay as it is, flat, so that a look at it costs next to nothing."""

    root: dict[str, Any]
    tables: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    values: tuple[Any, ...]
    containers: tuple[dict[str, Any], ...]
    sizes: list[int]
    modules: tuple[nn.Module, ...]
    kinds: tuple[type, ...]
    classes: tuple[type, ...]
    method_names: tuple[str, ...]
    methods: tuple[Any, ...]
    hooks: tuple[dict[int, Any], ...]
    parameter_tables: tuple[dict[str, Any], ...]
    parameter_names: tuple[str, ...]

    @classmethod
    def of(cls, graph_module: GraphModule) -> _Standing:
        """Return where everything is now."""
        kept: dict[str, Taken] = vars(graph_module)[STATE]
        places: Places = type(graph_module)._places  # type: ignore[attr-defined]
        rows: dict[tuple[int, str], Row] = {}
        modules: dict[int, nn.Module] = {}
        classes: dict[tuple[type, str], Any] = {}
        containers, hooks = [], []
        for path in places.passed:
            module: Any = module_at(graph_module, path)
            taken = kept[path]
            for row in _on_the_way(graph_module, path):
                rows[id(row[0]), row[1]] = row
            if taken.children is not None:
                containers.append(module._modules)
            if path in places.inline:
                for row in where_taken(taken, module, is_root=not path):
                    rows[id(row[0]), row[1]] = row
                modules[id(module)] = module
                classes |= {(own_class(module), name): method for name, method in taken.methods.items()}
                if path and not is_fully_sharded(module):
                    hooks += [getattr(module, name) for name in _HOOKS]
        for path in places.called:
            for row in _on_the_way(graph_module, path):
                rows[id(row[0]), row[1]] = row
        parameters = list(_operands(graph_module, places))
        tables, names, values = zip(*rows.values(), strict=True) if rows else ((), (), ())
        return cls(
            graph_module._modules,
            *(tables, names, values),
            tuple(containers),
            list(map(len, containers)),
            tuple(modules.values()),
            tuple(map(type, modules.values())),
            tuple(kind for kind, _ in classes),
            tuple(name for _, name in classes),
            tuple(classes.values()),
            tuple(hooks),
            tuple(table for _, table, _ in parameters),
            tuple(name for *_, name in parameters),
        )

    def holds(self, graph_module: GraphModule) -> bool:
        """Whether everything is as it was."""
        same = operator.is_
        return (
            graph_module._modules is self.root
            and all(map(same, map(dict.get, self.tables, self.names), self.values))
            and all(map(same, map(type, self.modules), self.kinds))
            and all(map(same, map(getattr, self.classes, self.method_names), self.methods))
            and list(map(len, self.containers)) == self.sizes
            and not any(self.hooks)
            and _kinds().issuperset(map(type, map(dict.get, self.parameter_tables, self.parameter_names)))
        )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _has(owner: nn.Module, name: str) -> bool:
    """Whether a module has something, which is not computed to find out."""
    tables: tuple[Any, ...] = (vars(owner), owner._parameters, owner._buffers, owner._modules)
    return any(name in table for table in tables) or hasattr(type(owner), name)


def _operands(graph_module: GraphModule, places: Places) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield where parameters are that operators are applied to, as far as no parametrization computes them."""
    for path in places.operated:
        owner: Any = module_at(graph_module, path.rpartition(".")[0])
        name = path.rpartition(".")[2]
        if not is_parametrized(owner, name) and name in owner._parameters:
            yield path, owner._parameters, name


def _on_the_way(graph_module: nn.Module, path: str) -> Iterator[Row]:
    module: Any = graph_module
    for part in path.split(".") if path else ():
        inner = module._modules.get(part)
        yield module._modules, part, inner
        module = inner


@functools.cache
def _kinds() -> frozenset[type]:
    """Return the classes of tensors that operators on weights know: torch's own, whole, sharded, or as told."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    found: set[type] = {Tensor, nn.Parameter, FakeTensor, FunctionalTensor}
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        found.add(DTensor)
    return frozenset(found)
