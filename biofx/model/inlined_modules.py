"""What a graph contains of modules whose forward is inlined in it, and would not see change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import is_parametrized

INLINED = "_taken_in"
"""The attribute of a graph module that holds an :class:`InlinedModule` for each path."""

_READ_LIVE = {"training", "momentum", "eps", "track_running_stats", "dropout"}
_SAYS_NOTHING = {
    *("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "transposed", "inplace"),
    *("num_features", "num_channels", "num_embeddings", "embedding_dim", "in1_features", "in2_features"),
    *("input_size", "hidden_size", "affine", "elementwise_affine", "kdim", "vdim", "head_dim", "bias"),
}
"""Settings that follow from tensors, or that change no value."""
_READ_INLINE = {"p"}
"""Settings that are read at every call of an inlined dropout, and may be relied on where it is called."""
_OF_UNDERSCORE = {"_reversed_padding_repeated_twice", "_qkv_same_embed_dim"}
_FORWARDS = ("forward", "_conv_forward", "_output_padding", "_check_input_dim", "_apply_instance_norm")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_PLAIN = (int, float, str, type(None), torch.dtype, FunctionType, BuiltinFunctionType)
_TABLES = ("_parameters", "_buffers", "_modules")
_ABSENT = object()

SAME = "_taken_as_the_same"
"""The attribute of a graph module that holds pairs of paths that led to one module or parameter."""

Row = tuple[dict[str, Any], str]
"""A table, and a name in it whose value must not change."""


@dataclass(frozen=True)
class InlinedModule:
    """The state of a module when its forward was inlined in a graph."""

    kind: Any
    """Its class, or the name of the class after pickling, since a user's class may be a local one."""
    methods: Mapping[str, Any] = field(default_factory=dict)
    """The methods of its class by name; empty after pickling."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings that are constants in the graph."""
    absent: tuple[str, ...] = ()
    """Names of attributes that were None, and could become a tensor or a module."""
    children: tuple[str, ...] | None = None
    """Names of the modules in a container, in order; None for other modules."""
    is_computed: bool = False
    """Whether it had a parametrization."""

    @classmethod
    def of(cls, module: nn.Module) -> InlinedModule:
        """Return the present state of a module."""
        kind = own_class(module)
        children = None
        if isinstance(module, _CONTAINERS):
            children = tuple(name for name in module._modules if name != "bio_mod")
        own = kind.__module__.startswith("torch.") and children is None
        absent = {name for table in _TABLES for name, held in getattr(module, table).items() if held is None}
        if not own:  # None is a plain attribute until a module is assigned
            absent |= {name for name, held in vars(module).items() if held is None}
        return cls(
            kind,
            methods_of(kind),
            settings_of(module) if own else {},
            tuple(absent),
            children,
            is_parametrized(module),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> InlinedModule:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        kind = full_name(self.kind) if isinstance(self.kind, type) else self.kind
        settings = {name: value for name, value in self.settings.items() if not callable(value)}
        return InlinedModule, (kind, {}, settings, self.absent, self.children, self.is_computed)

    def difference(
        self, module: nn.Module, *, is_run: bool = True, is_root: bool = False, is_compact: bool = False
    ) -> str | None:
        """Describe how another module differs; None if it computes the same.

        Args:
            module: the module at the path now.
            is_run: whether the module's forward is inlined in the graph.
            is_root: whether the graph is that of the module itself.
            is_compact: whether the graph calls it with one value for each connection.
        """
        if not is_run:
            return self._other_children(module)
        changed = self._other_class(module, is_root=is_root) or self._other_content(module, is_compact)
        return changed or self._other_children(module)

    def _other_class(self, module: nn.Module, *, is_root: bool) -> str | None:
        kind = own_class(module)
        if not is_root and kind is not self.kind and full_name(kind) != self.kind:
            was = full_name(self.kind) if isinstance(self.kind, type) else self.kind
            return f"it is a {full_name(kind)} now, and was a {was}"
        for name in () if is_root else self.methods or _FORWARDS:
            if name in vars(module):
                return f"its {name} was replaced on the instance"
        for name, method in self.methods.items():
            if getattr(kind, name, None) is not method:
                return f"the {name} of its class was replaced"
        return None

    def _other_content(self, module: nn.Module, is_compact: bool) -> str | None:
        found = settings_of(module) if self.settings else {}
        for name, value in self.settings.items():
            if found.get(name, _ABSENT) != value and (is_compact or name not in _READ_INLINE):
                return f"its {name} is {getattr(module, name, None)!r}, and was {value!r}"
        for name in self.absent:
            if any(getattr(module, table).get(name) is not None for table in _TABLES):
                return f"its {name} was None, and is not any more"
        return None

    def _other_children(self, module: nn.Module) -> str | None:
        names = [name for name in module._modules if name != "bio_mod"]
        if self.children is not None and list(self.children) != names:
            return f"it holds [{', '.join(names)}], and held [{', '.join(self.children)}]"
        return None


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module before graphs, sharding and parametrizations replaced it."""
    kind: Any = type(module)
    if isinstance(module, GraphModule):
        kind = getattr(kind, "_user_class", None) or nn.Module
    if hasattr(kind, "unshard"):  # fully_shard puts a class of its own in front
        kind = kind.__bases__[-1]
    if is_parametrized(module) and kind.__name__.startswith("Parametrized"):
        kind = kind.__bases__[0]
    return kind  # type: ignore[no-any-return]


def full_name(kind: type) -> str:
    """Return the name of a class with that of its Python module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def methods_of(kind: type[nn.Module]) -> dict[str, Any]:
    """Return the methods that determine what a class computes: all of the user's, and torch's forwards."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if base is nn.Module or not issubclass(base, nn.Module):
            continue
        torchs = base.__module__.startswith("torch.")
        for name in _FORWARDS if torchs else tuple(vars(base)):
            method = vars(base).get(name)
            if isinstance(method, FunctionType) and not name.startswith("__"):
                found.setdefault(name, method)
    return found


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Return the settings of one of torch's modules that are constants in the call of its function."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(module).items()
        if name not in _READ_LIVE | _SAYS_NOTHING
        and (not name.startswith("_") or name in _OF_UNDERSCORE)
        and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(entry, _PLAIN) for entry in value)
    return isinstance(value, _PLAIN)


def fixed_rows(inlined: InlinedModule, module: nn.Module) -> Iterator[Row]:
    """Yield the entries of an inlined module's tables that must not change."""
    held = vars(module)
    yield from ((held, name) for name in inlined.settings)
    yield from ((held[table], name) for table in _TABLES for name in inlined.absent if name in held[table])


def same_twice(root: nn.Module) -> tuple[tuple[str, str], ...]:
    """Return pairs of paths that lead to one module or parameter."""
    pairs: list[tuple[str, str]] = []
    for named in (root.named_modules, root.named_parameters):
        first: dict[int, str] = {}
        for path, held in named(remove_duplicate=False):
            known = first.setdefault(id(held), path)
            if known != path:
                pairs.append((known, path))
    return tuple(pairs)


def same_for_graph(root: nn.Module, used: Iterable[str]) -> list[tuple[str, str]]:
    """Return those of the pairs that matter to a graph which uses these paths."""
    wanted = set(used)
    pairs: tuple[tuple[str, str], ...] = vars(root)[SAME]
    return [pair for pair in pairs if wanted & set(pair)]
