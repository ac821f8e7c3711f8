"""What the Python code of a forward mentions by name, for questions that only its author can settle."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from biofx.capture.identity_questions import compares_identities
from biofx.unasked import attributes_of, is_installed, is_of, package_of, packages_of

ANYTHING = "*"
"""Stands for whatever has no name of its own in the code."""
ASKS_WHETHER_THE_SAME = "asks whether two values are the same object, which no graph can say"
_LIBRARIES = ("torch.", "builtins.", "typing.", "collections.", "functools.", "math.", "numpy.")
_TORCHS = ("torch", "builtins")

Found = TypeVar("Found")


def _once_a_class(function: Callable[[Any], Found]) -> Callable[[Any], Found]:
    """Answer for each class once, as long as there is the class: each graph module has one of its own."""
    known: WeakKeyDictionary[type, Found] = WeakKeyDictionary()

    @functools.wraps(function)
    def remembered(kind: type) -> Found:
        if kind not in known:
            known[kind] = function(kind)
        return known[kind]

    return remembered


def names_mentioned(module: nn.Module) -> frozenset[str]:
    """Return the attributes, globals and texts that a module's forward mentions, and what it calls does."""
    return frozenset(name for code in _code_of_class(type(module)) for name in _names(code))


def methods_mentioned(kind: type[nn.Module]) -> frozenset[str]:
    """Return what the forward of a class mentions of what the class, or one that it derives from, defines."""
    defined = {name for base in lineage_of(kind) for name in vars(base)}
    return frozenset(name for code in _code_of_class(kind) for name in _names(code)) & defined


def weights_mentioned(module: nn.Module) -> frozenset[str]:
    """Return whose weights a module's forward mentions: ``"fc"`` for ``self.fc.weight``.

    Its own is left out; :data:`ANYTHING` for that of something without a name, as in ``layer.weight``.
    """
    kind: Any = type(module)
    return _weights_mentioned(kind)


@_once_a_class
def _weights_mentioned(kind: Any) -> frozenset[str]:
    found: set[str] = set()
    for code in _code_of_class(kind):
        before: dis.Instruction | None = None
        for instruction in dis.get_instructions(code):
            if is_a_weight(instruction.argval) and "ATTR" in instruction.opname and before is not None:
                if before.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
                    found.add(str(before.argval))
                elif before.argval != "self":
                    found.add(ANYTHING)
            before = instruction
    return frozenset(found)


def is_a_weight(name: object) -> bool:
    """Whether an attribute is the weight of a layer of torch's, or one of its weights."""
    return name in ("weight", "in_proj_weight", "all_weights", "_flat_weights") or str(name).startswith(
        ("weight_ih", "weight_hh")
    )


def attributes_changed(module: nn.Module) -> frozenset[str]:
    """Return the names of the attributes of any object to which a module's forward may give other values."""
    kind: Any = type(module)
    return _attributes_changed(kind)


@_once_a_class
def _attributes_changed(kind: Any) -> frozenset[str]:
    found: set[str] = set()
    for code in _code_of_class(kind):
        before: list[str] = []
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("STORE_ATTR", "DELETE_ATTR"):
                found.add(str(instruction.argval))
            elif instruction.opname == "STORE_SUBSCR" or instruction.argval in _CHANGING_METHODS:
                found.update(before)
            if instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
                before = [str(instruction.argval)]
    return frozenset(found)


_CHANGING_METHODS = frozenset(
    {
        *("append", "appendleft", "extend", "insert", "pop", "popleft", "popitem", "remove", "clear"),
        *("update", "setdefault", "add", "discard"),
    }
)


@functools.lru_cache(maxsize=4096)
def operands_read(code: CodeType) -> frozenset[int]:
    """Return where code reads an attribute that goes straight into arithmetic, as in ``x * self.k``.

    Offsets of the instructions that read it.
    """
    steps = [step for step in dis.get_instructions(code) if step.opname not in _SILENT]
    found = set()
    for read, *after in zip(steps, steps[1:], steps[2:], strict=False):
        if read.opname == "LOAD_ATTR":
            skipped = 1 if after[0].opname.startswith(("LOAD_FAST", "LOAD_DEREF")) else 0
            operation = after[skipped]
            if operation.opname == "BINARY_OP" and operation.argrepr in ("+", "-", "*", "/", "**"):
                found.add(read.offset)
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def makes_texts(code: CodeType) -> bool:
    """Whether code puts numbers into texts with ``%``, which reads them without asking."""
    has_pattern = any(isinstance(constant, str) and "%" in constant for constant in code.co_consts)
    return has_pattern and any(step.argrepr in ("%", "%=") for step in dis.get_instructions(code))


_SILENT = ("CACHE", "EXTENDED_ARG", "NOP", "RESUME", "PRECALL", "PUSH_NULL")


def globals_mentioned(kind: type[nn.Module]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the globals that the forward of a class, and what it calls, mention: where, and the name.

    Those of libraries are left out, but for the one that brings the class.
    """
    own = packages_of([kind])
    for function in _functions_of(kind, through_modules=True):
        package = str(function.__module__).partition(".")[0]
        if package not in _TORCHS and (package in own or not is_installed(package)):
            yield from _globals_in(function)


def globals_named(kind: type[nn.Module]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the same for whatever function it may call, that of a library too."""
    for function in _functions_of(kind, through_modules=True):
        if not f"{function.__module__}.".startswith(_LIBRARIES):
            yield from _globals_in(function)


def lineage_of(kind: type[nn.Module]) -> Iterator[type]:
    """Yield a class and those that it derives from, but for torch's and Python's."""
    return (base for base in kind.__mro__ if package_of(base) not in _TORCHS)


def _globals_in(function: FunctionType) -> Iterator[tuple[dict[str, Any], str]]:
    names = {name for code in _with_inner(function.__code__) for name in code.co_names}
    yield from ((function.__globals__, name) for name in names & function.__globals__.keys())


@_once_a_class
def asks_whether_the_same(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class, or what it calls, asks of two values whether they are one object."""
    functions = () if kind.__module__.startswith("torch.") else _functions_of(kind)
    own = (f for f in functions if not f"{f.__module__}.".startswith(_LIBRARIES))
    return any(compares_identities(code) for f in own for code in _with_inner(f.__code__))


def _code_of_class(kind: type[nn.Module]) -> Iterator[CodeType]:
    """Yield the code of a forward, of methods and of functions of its own source that it may call."""
    for function in _functions_of(kind):
        yield from _with_inner(function.__code__)


def _functions_of(kind: type[nn.Module], *, through_modules: bool = False) -> Iterator[FunctionType]:
    """Yield the functions that a forward may call; those that it finds in Python's modules if asked to."""
    seen: set[CodeType] = set()
    functions: list[Any] = [kind.forward]
    while functions:
        function = functions.pop()
        function = attributes_of(function).get("__wrapped__", function)
        if type(function) is not FunctionType or function.__code__ in seen:
            continue
        code = function.__code__
        seen.add(code)
        yield function
        names = list(_names(code))
        spaces = [function.__globals__]
        spaces += _modules_among(names, function.__globals__) if through_modules else ()
        for name in names:
            for called in (*_methods(kind, name), *(space.get(name) for space in spaces)):
                while "__wrapped__" in attributes_of(called):
                    called = attributes_of(called)["__wrapped__"]
                if type(called) is FunctionType and not f"{called.__module__}.".startswith(_LIBRARIES):
                    functions.append(called)


def _modules_among(names: Iterable[str], space: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what is in the modules of Python among some globals, as ``module.function`` looks it up."""
    for held in (space.get(name) for name in names):
        if is_of(held, ModuleType) and not f"{attributes_of(held).get('__name__')}.".startswith(_LIBRARIES):
            yield attributes_of(held)


def _methods(kind: type[nn.Module], name: str) -> Iterator[Any]:
    """Yield the functions behind an attribute, those that ``super()`` leads to as well."""
    for parent in kind.__mro__:
        held: Any = vars(parent).get(name)
        if is_of(held, property):
            yield from (held.fget, held.fset)
        else:
            yield held.__func__ if is_of(held, (staticmethod, classmethod)) else held


def _with_inner(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_inner(constant)


def _names(code: CodeType) -> Iterator[str]:
    for inner in _with_inner(code):
        yield from inner.co_names
        yield from (text for text in inner.co_consts if isinstance(text, str))  # getattr(self, "fc")
