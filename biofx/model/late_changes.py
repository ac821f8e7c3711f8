"""Changes of modules after their capture that a graph would not follow: they are errors, and never ignored.

A graph does not call modules whose forward is inlined in it. The state that each of them had at the capture
is kept with the graph (:class:`biofx.model.inlined_modules.InlinedModule`) and compared with the module that
is at its path now. If nothing changed since the last comparison, a :class:`_Snapshot` says so at once.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import is_parametrized

from biofx.errors import BiofxError, CaptureError, InputError
from biofx.layers.layer_kind import hooks_of
from biofx.model.attribute_guards import refuse_changed_attributes
from biofx.model.called_again import (
    STATE_OF_WEIGHT,
    Become,
    call_again,
    find_again,
    lines_as_transformed,
    note_parts,
)
from biofx.model.graph_places import Places, held_at, module_at
from biofx.model.inlined_modules import (
    INLINED,
    SAME,
    InlinedModule,
    Row,
    fixed_rows,
    own_class,
    same_for_graph,
    same_twice,
)
from biofx.plasticity.agreement import is_parallelized
from biofx.plasticity.ranks import is_fully_sharded
from biofx.plasticity.tensor_parallel import refuse_in_parts
from biofx.torch_private import tensors_of_compilers

_INLINE = "Its forward is inlined in the graph, which does not call it"
_COMPACT = "Splits are folded here, and the graph calls it with one value for all synapses of a connection"
_REMEDY = "change the model before biofx.transform, or change the model that biofx.deploy returns"


def following_changes(forward: Any, owner: Any, become: Become) -> Any:
    """Return a forward of a graph module that first checks whether modules were changed since the capture.

    A compiler checks once, when it compiles. The forward has the globals of the given one, in which
    ``torch.jit.script`` looks up names.
    """
    held = weakref.ref(owner)

    def looked() -> bool:
        return follow_late_changes(held(), become)

    vars(looked)["_dynamo_marked_constant"] = (
        True  # torch.compiler.assume_constant_result imports the compiler
    )

    def followed(self: Any, *args: Any, **kwargs: Any) -> Any:
        changed = looked() if is_compiling() else look(self, become) or type(self)._latest is not made
        if changed:  # now, or after a reference to this forward was taken
            return type(self)._latest(self, *args, **kwargs)
        check(self)
        shown = None if is_compiling() else type(self)._shown
        if shown is not None and self.training and len(shown.listeners):
            return shown.forward(self, *args, **kwargs)
        return forward(self, *args, **kwargs)

    is_compiling, look, check = torch.compiler.is_compiling, follow_late_changes, refuse_changed_attributes
    made = FunctionType(followed.__code__, forward.__globals__, forward.__name__, None, followed.__closure__)
    return functools.update_wrapper(made, forward)


def remember_modules(graph_module: GraphModule) -> Places:
    """Store in a graph module the state of the modules that are inlined in its graph."""
    places = Places.of(graph_module)
    kept: dict[str, InlinedModule] = vars(graph_module).setdefault(INLINED, {})
    for path in places.passed:
        module = module_at(graph_module, path)
        if path not in kept and module is not None:
            kept[path] = InlinedModule.of(module)
    if SAME not in vars(graph_module):
        vars(graph_module)[SAME] = same_twice(graph_module)
    return places


def follow_late_changes(graph_module: Any, become: Become) -> bool:
    """Check whether the modules of a graph were changed; return whether the graph was changed to follow them.

    Raises:
        CaptureError: a module was changed in a way that the graph does not follow.
        InputError: a module has a hook that would never run.
    """
    kind = type(graph_module)
    snapshot: _Snapshot | None = kind._snapshot
    if snapshot is not None and snapshot.holds(graph_module):
        return False
    kind._places = remember_modules(graph_module)
    changed, before = False, None
    if any(
        is_parallelized(module) for path in kind._places.inline if (module := module_at(graph_module, path))
    ):
        refuse_in_parts(graph_module)
        before = lines_as_transformed(graph_module)
    while (found := _first_difference(graph_module)) is not None:
        path, error = found
        if not call_again(graph_module, path, become) and not find_again(graph_module):
            raise error
        changed = True
    if before is not None:
        note_parts(graph_module, before)
    kind._snapshot = _Snapshot.of(graph_module, kind._places)
    return changed


def _first_difference(graph_module: GraphModule) -> tuple[str, BiofxError] | None:
    """Return the path of the first module that was changed, and the error if the graph cannot follow it."""
    kept: dict[str, InlinedModule] = vars(graph_module)[INLINED]
    places: Places = type(graph_module)._places  # type: ignore[attr-defined]
    for path in places.passed:
        module, named = module_at(graph_module, path), f"module {path!r}" if path else "the model"
        if module is None:
            layer, state, _ = path.partition(f".{STATE_OF_WEIGHT}")
            message = _replaced(layer, "state") if state else f"{named} is no longer there"
            return path, _changed(message)
        is_run = path in places.inline
        is_compact = path in places.compact
        difference = kept[path].difference(
            module, is_run=is_run or is_compact, is_root=not path, is_compact=is_compact
        )
        if difference is not None:
            message = f"{named} was changed since the model was captured: {difference}"
            return path, _changed(message, _COMPACT if is_compact else _INLINE)
        if is_run and path and not is_fully_sharded(module) and (hooks := hooks_of(module)):
            error = _hooked(module, path, hooks)
            computes = "weight" in vars(module)  # as hooks of torch.nn.utils.prune do
            if not computes and not is_parallelized(module):
                raise error
            return path, error
        if path in places.repeated and is_parametrized(module) and not kept[path].is_computed:
            message = f"{named} has a parametrization now, which computes the weight at each of its calls"
            return path, _changed(message, "The graph reads the weight once for all of them")
    for first, other in same_for_graph(graph_module, places.used):
        if held_at(graph_module, first) is not held_at(graph_module, other):
            message = f"{other!r} was the same as {first!r} when the model was captured, and is not any more"
            return other, _changed(message, "The graph uses only one of them")
    for path in places.called:
        if module_at(graph_module, path) is None:
            return path, _changed(f"module {path!r}, which the graph calls, is no longer there")
    for path in places.read:
        owner_path, _, name = path.rpartition(".")
        owner = module_at(graph_module, owner_path)
        if owner is None or not _has(owner, name):
            return owner_path, _changed(_missing(owner_path, name))
    for path, table, name in _operands_of(graph_module, places):
        if type(table.get(name)) not in _kinds_of_tensors():
            return path.rpartition(".")[0], _changed(
                f"{path!r} is a {type(table.get(name)).__name__} now, and the graph computes with it "
                "before it is used"
            )
    return None


def _missing(owner: str, name: str) -> str:
    layer, _, state = owner.rpartition(".")
    if state == STATE_OF_WEIGHT:
        return _replaced(layer, name)
    return f"module {owner!r} has no {name!r} any more, which the graph reads"


def _replaced(layer: str, state: str) -> str:
    return (
        f"module {layer!r} was replaced since the model was captured, and the {state} of the weight of the "
        "former layer is missing"
    )


def _changed(message: str, why: str = _INLINE) -> CaptureError:
    return CaptureError(f"{message}. {why}: {_REMEDY}")


def _hooked(module: nn.Module, path: str, hooks: list[str]) -> InputError:
    if is_parallelized(module):
        return InputError(
            f"module {path!r} ({type(module).__name__}) is computed in parts by several ranks "
            "(parallelize_module), and the graph, in which its forward is inlined, cannot call it: its "
            "weight is folded, or other layers share it; leave it out of the plan"
        )
    return InputError(
        f"module {path!r} ({type(module).__name__}) has {' and '.join(hooks)}, which "
        "would never run: its forward is inlined in the graph, which does not call it. Remove them, or "
        f"register them before the model is transformed, with opaque=[{path!r}]"
    )


def _has(owner: nn.Module, name: str) -> bool:
    """Whether a module has an attribute, without computing it."""
    tables: tuple[Any, ...] = (vars(owner), owner._parameters, owner._buffers, owner._modules)
    return any(name in table for table in tables) or hasattr(type(owner), name)


@dataclass(frozen=True)
class _Snapshot:
    """The module tree at the last comparison, in flat tables, so that checking it again takes little time.

    Everything is compared by identity or size, in loops of builtin functions.
    """

    root: dict[str, Any]
    tables: tuple[tuple[Callable[[Any], Any], dict[str, Any]], ...]
    """Tables of modules, each with a function that returns some of its entries."""
    values: list[Any]
    """Those entries."""
    sized: tuple[dict[str, Any], ...]
    """Tables that must keep their size: of containers, and of attributes, which may hide methods."""
    sizes: list[int]
    modules: tuple[nn.Module, ...]
    kinds: tuple[type, ...]
    classes: tuple[type, ...]
    names: tuple[str, ...]
    methods: tuple[Any, ...]
    """Methods of these classes, by these names."""
    hooks: tuple[dict[int, Any], ...]
    twice: tuple[tuple[dict[str, Any], ...], tuple[str, ...], tuple[dict[str, Any], ...], tuple[str, ...]]
    """Tables and names of pairs of entries that must be one object."""
    operands: tuple[tuple[dict[str, Any], ...], tuple[str, ...]]
    """Tables and names of parameters to which the graph applies operators."""

    @classmethod
    def of(cls, graph_module: GraphModule, places: Places) -> _Snapshot:
        """Return the present state."""
        kept: dict[str, InlinedModule] = vars(graph_module)[INLINED]
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
                rows += fixed_rows(kept[path], module)
                methods |= {(own_class(module), name): held for name, held in kept[path].methods.items()}
                sized.append(vars(module))
                # the whole model, or a region, runs its own hooks
                if path in places.inline - {""} and not is_fully_sharded(module):
                    hooks += [getattr(module, name) for name in _HOOKS]
        tables = _by_table(rows)
        pairs = [(*_holder(graph_module, first), *_holder(graph_module, other)) for first, other in same]
        operands = tuple((table, name) for _, table, name in _operands_of(graph_module, places))
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
        """Whether nothing has changed since."""
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
                and _kinds_of_tensors().issuperset(map(type, map(dict.get, *self.operands)))
            )
        except (KeyError, AttributeError):  # an entry was removed
            return False


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _operands_of(graph_module: GraphModule, places: Places) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield path, table and name of each parameter to which operators are applied, unless it is computed."""
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
def _kinds_of_tensors() -> frozenset[type]:
    """Return the classes of tensors that operators on weights accept: torch's own, sharded or not."""
    found: set[type] = {Tensor, nn.Parameter, *tensors_of_compilers()}
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        found.add(DTensor)
    return frozenset(found)
