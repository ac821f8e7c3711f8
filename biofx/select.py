"""Which nodes of a graph a pass may touch: selection by name, and loud.

A selector is one of these, or a list of them (any of which may match):

=========================  ================================================================================
``"layer1.0.conv1"``       a module path: that module's nodes, and those of everything inside it
``"add_3"``                an FX node name; where a module path reads the same, the module path wins
``"rnn.W_rec"``            the path of a parameter or buffer: the nodes in which the forward reads it itself
``"fc#1"``                 one call of a module that is called several times, counted from 0
``"layer*.conv?"``         a glob over module paths and node names; ``*`` crosses dots
``"re:layer[12]\\..*"``     a regular expression that a whole module path or node name must match
``"type:Conv2d"``          modules of a class, or of a subclass, by its name; the class itself does too
a callable                 called with each :class:`Candidate`; true selects it
=========================  ================================================================================

A selector that matches nothing is an error that names the nearest candidates.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from torch import nn
from torch.fx import GraphModule, Node

from biofx.errors import SelectorError, suggest

__all__ = ["Candidate", "Override", "Pattern", "Selector"]


@dataclass(frozen=True)
class Candidate:
    """What a predicate sees of one node."""

    node: Node
    """The ``torch.fx`` node."""
    calls: tuple[tuple[str, int], ...]
    """The module calls the node lies in, outermost first: module path and index of the call, from 0."""
    module: nn.Module
    """The innermost of those modules; the model itself for a node that lies in none."""

    @property
    def name(self) -> str:
        """The node's name in the graph."""
        return self.node.name

    @property
    def path(self) -> str:
        """Path of the innermost module, empty for the model itself."""
        return self.calls[-1][0] if self.calls else ""

    @property
    def call(self) -> int:
        """Index of the call of that module, from 0."""
        return self.calls[-1][1] if self.calls else 0


Pattern: TypeAlias = str | type | Callable[[Candidate], bool]
Selector: TypeAlias = Pattern | Sequence[Pattern]


@dataclass(frozen=True)
class Override:
    """Options that hold only for what a selector picks."""

    selector: Selector
    options: tuple[tuple[str, Any], ...]


def check_selector(selector: Selector) -> Selector:
    """Return the selector in its plain form: lists as tuples, classes as ``type:`` names.

    Raises:
        SelectorError: it is not one of the forms above, or its regular expression does not compile.
    """
    if isinstance(selector, (list, tuple)):
        return tuple(_check_pattern(pattern) for pattern in selector)
    return _check_pattern(selector)


def _check_pattern(pattern: Any) -> Pattern:
    if isinstance(pattern, type):
        return f"type:{pattern.__module__}.{pattern.__qualname__}"
    if isinstance(pattern, str) and pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise SelectorError(f"selector {pattern!r} is not a regular expression: {error}") from error
    elif not (isinstance(pattern, str) and pattern) and not callable(pattern):
        raise SelectorError(
            "a selector is a name, a glob, 're:…', 'type:…', a module class, a predicate, or a list of "
            f"these; found {pattern!r}"
        )
    checked: Pattern = pattern
    return checked


@dataclass(frozen=True)
class Match:
    """What one pattern picked."""

    pattern: Pattern
    nodes: frozenset[Node]
    paths: frozenset[str]
    """Module paths it picked, called in the graph or not."""


class NodeIndex:
    """A graph's nodes and modules, ready to be asked by name. Build it anew when the graph has changed."""

    def __init__(self, graph_module: GraphModule) -> None:
        self.graph_module = graph_module

    @cached_property
    def candidates(self) -> list[Candidate]:
        """The nodes, in graph order."""
        return [self._candidate(node) for node in self.graph_module.graph.nodes]

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.graph_module.named_modules(remove_duplicate=False))

    @cached_property
    def _classes(self) -> dict[str, set[str]]:
        """The names of the classes of each module.

        Of a module that is not held as it was, as in a graph of dynamo or of ``torch.export``, the nodes say
        what it was.
        """
        found = {path: _names_of(type(module)) for path, module in self._modules.items()}
        for candidate in self.candidates:
            for path, kind in _stack_of(candidate.node):
                if path in found:
                    found[path] |= _names_of(kind)
        return found

    @cached_property
    def _by_name(self) -> dict[str, Candidate]:
        return {candidate.name: candidate for candidate in self.candidates}

    @cached_property
    def _reads(self) -> dict[str, list[Node]]:
        found: dict[str, list[Node]] = {}
        for candidate in self.candidates:
            if candidate.node.op == "get_attr":
                found.setdefault(str(candidate.node.target), []).append(candidate.node)
        return found

    def match(self, pattern: Pattern) -> Match:
        """Return what ``pattern`` picks.

        Raises:
            SelectorError: it picks nothing; the message names what comes nearest.
        """
        pattern = _check_pattern(pattern)
        paths, nodes = self._find(pattern)
        if not paths and not nodes:
            raise SelectorError(f"selector {show_pattern(pattern)} matches nothing{self._nearest(pattern)}")
        return Match(pattern, frozenset(nodes), frozenset(paths))

    def matches(self, selector: Selector) -> list[Match]:
        """Return what each pattern of ``selector`` picks.

        Raises:
            SelectorError: one of them picks nothing.
        """
        checked = check_selector(selector)
        patterns = checked if isinstance(checked, tuple) else (checked,)
        return [self.match(pattern) for pattern in patterns]

    def near(self, selector: Selector) -> list[str]:
        """Return names that almost match, nearest first."""
        known = [*(path for path in self._modules if path), *self._by_name, *self._reads]
        patterns = selector if isinstance(selector, (list, tuple)) else (selector,)
        found: list[str] = []
        for pattern in patterns:
            if isinstance(pattern, str):
                found += difflib.get_close_matches(pattern, known, n=5, cutoff=0.6)
        return list(dict.fromkeys(found))

    def _candidate(self, node: Node) -> Candidate:
        calls = module_calls(node)
        module = self._modules.get(calls[-1][0] if calls else "", self.graph_module)
        return Candidate(node, calls, module)

    def _find(self, pattern: Pattern) -> tuple[Iterable[str], Iterable[Node]]:
        if not isinstance(pattern, str):
            return (), [candidate.node for candidate in self.candidates if pattern(candidate)]
        if pattern.startswith("type:"):
            return self._within({path for path, names in self._classes.items() if pattern[5:] in names})
        if pattern.startswith("re:"):
            return self._where(re.compile(pattern[3:]).fullmatch)
        if pattern in self._modules:
            return self._within({pattern})
        if pattern in self._by_name:
            return (), [self._by_name[pattern].node]
        if pattern in self._reads:
            return (), self._reads[pattern]
        path, hash_sign, call = pattern.rpartition("#")
        if hash_sign and call.isdecimal() and path in self._modules:
            wanted = (path, int(call))
            return (), [candidate.node for candidate in self.candidates if wanted in candidate.calls]
        if any(character in pattern for character in "*?["):
            return self._where(re.compile(fnmatch.translate(pattern)).match)
        return (), ()

    def _where(self, fits: Callable[[str], object]) -> tuple[Iterable[str], Iterable[Node]]:
        paths, nodes = self._within({path for path in self._modules if path and fits(path)})
        named = [candidate.node for candidate in self.candidates if fits(candidate.name)]
        return paths, [*nodes, *named]

    def _within(self, paths: set[str]) -> tuple[set[str], list[Node]]:
        found = paths | {path for path in self._modules if _ancestors(path) & paths}
        # what lies below counts: a ModuleList is never called itself, the modules in it are
        inside = [c.node for c in self.candidates if any(path in found for path, _ in c.calls)]
        if "" in paths:
            inside = [candidate.node for candidate in self.candidates]
        return found, inside

    def _nearest(self, pattern: Pattern) -> str:
        if not isinstance(pattern, str):
            return ""
        path, hash_sign, call = pattern.rpartition("#")
        if hash_sign and path in self._modules:
            count = len({calls for c in self.candidates for calls in c.calls if calls[0] == path})
            return (
                f": {path!r} is called {count} times in this graph, counted from 0; there is no call {call}"
            )
        if pattern.startswith("type:"):
            names = sorted({name for names in self._classes.values() for name in names if "." not in name})
            by_name = any(isinstance(kind, str) for c in self.candidates for _, kind in _stack_of(c.node))
            known = "; a program of torch.export names the classes of its modules, not their bases"
            return suggest(pattern[5:].rpartition(".")[2], names) + (known if by_name else "")
        return suggest(pattern, [*self._modules, *self._by_name, *self._reads]) or (
            "; 'biofx explain' and biofx.format_graph show the names there are"
        )


def module_calls(node: Node) -> tuple[tuple[str, int], ...]:
    """Return the module calls ``node`` was traced in, outermost first: path and index of the call."""
    calls = []
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        _, _, index = str(key).partition("@")
        calls.append((path, int(index) if index.isdigit() else 0))
    return tuple(calls)


@dataclass(frozen=True)
class Selection:
    """``only`` and ``exclude``, resolved: the nodes and module paths that are in."""

    index: NodeIndex
    only: tuple[Match, ...] | None
    exclude: tuple[Match, ...]

    @classmethod
    def of(cls, index: NodeIndex, only: Selector | None, exclude: Selector | None) -> Selection:
        """Resolve both selectors against a graph.

        Raises:
            SelectorError: one of their patterns matches nothing.
        """
        included = None if only is None else tuple(index.matches(only))
        return cls(index, included, () if exclude is None else tuple(index.matches(exclude)))

    def why_not(self, node: Node | None, path: str) -> str | None:
        """Return why a node (or, without one, the module at ``path``) is out; None when it is in."""
        for match in self.exclude:
            if picks(match, node, path):
                return f"excluded by {show_pattern(match.pattern)}"
        if self.only is None or any(picks(match, node, path) for match in self.only):
            return None
        return f"not selected by only={[_plain(match.pattern) for match in self.only]}"


def picks(match: Match, node: Node | None, path: str) -> bool:
    """Return whether a match holds for a node, or without one for the module at ``path``."""
    return node in match.nodes if node is not None else path in match.paths


def _stack_of(node: Node) -> Iterable[tuple[str, type | str]]:
    """Return the paths of the modules in which a node was traced, outermost first, and their classes."""
    found: Iterable[tuple[str, type | str]] = (node.meta.get("nn_module_stack") or {}).values()
    return found


def _names_of(kind: type | str) -> set[str]:
    """Return the names of a class and of its bases, short and with the module; of a name both forms."""
    if isinstance(kind, str):
        return {kind, kind.rpartition(".")[2]}
    return {name for c in kind.__mro__ for name in (c.__name__, f"{c.__module__}.{c.__qualname__}")}


def _ancestors(path: str) -> set[str]:
    parts = path.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts) + 1)}


def _plain(pattern: Pattern) -> str:
    return pattern if isinstance(pattern, str) else getattr(pattern, "__qualname__", type(pattern).__name__)


def show_pattern(pattern: Pattern) -> str:
    """Return a pattern for a message: a text in quotes, a predicate's name."""
    return repr(pattern) if isinstance(pattern, str) else _plain(pattern)
