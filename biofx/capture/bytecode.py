"""Everything that capture reads from bytecode and from interpreter frames.

A proxy sees only what Python asks it for. What Python decides without asking, and what must be known of code
before it runs, is read from the code itself, here and nowhere else in capture:

* ``x is None``, ``x is True`` and ``x is y`` compare identities without a call. Where a forward compares a
  value with a constant, the graph gets a check that the value is given; where it compares two values, no
  graph can be right.
* ``f"{x}" == "…"`` decides by a text, which does not lead back to the value that it was made of; ``"%d" % x``
  reads a number without calling one of its methods.
* ``x * self.k`` and ``if self.k:`` read an attribute in the same way, but only the second decides by it.
* ``isinstance``, ``hasattr`` and ``match`` call what torch itself calls all the time. Which of the two it is,
  and on which line of the model (for messages), only the calling frame says.
* An ``except`` clause may be taken at another input, without a trace at this one.
* A forward that stays in Python may use weights, attributes and globals around the calls that are captured.
  It is not run for that, so the names in its code have to do.

The opcodes are those of CPython 3.10 to 3.14.
"""

from __future__ import annotations

import dis
import functools
import itertools
import linecache
import sys
import traceback
import typing
from abc import ABCMeta
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from biofx.static_inspection import attributes_of, bases_outside_torch, is_installed, is_of, packages_of
from biofx.torch_private import jit_internal

Found = TypeVar("Found")

# frames

_TORCH_FOLDER = torch.__path__[0]
_OWN_FOLDER = str(Path(__file__).parent)
_ON_BEHALF = frozenset(
    {
        *(torch.nn.parameter.__file__, torch.__file__, torch.jit.__file__, jit_internal.__file__),
        *(ABCMeta.__instancecheck__.__code__.co_filename, typing.__file__),
    }
)
"""Files with functions that ask for a type because their caller does."""
_TYPE_QUERIES = ("isinstance", "is_tensor", "__class__")


class CallSite:
    """Where a running frame stands: who reads or calls something, and what happens to the result next."""

    def __init__(self, frame: FrameType) -> None:
        self._frame = frame
        self._code = frame.f_code

    @classmethod
    def of_caller(cls) -> CallSite:
        """Return the place from which the function was called that calls this."""
        return cls(sys._getframe(2))

    @classmethod
    def outside(cls) -> CallSite:
        """Return the innermost place that is not in biofx."""
        return cls(next(frame for frame in _running_frames() if not _is_of_biofx(frame)))

    @classmethod
    def in_model(cls) -> CallSite | None:
        """Return the innermost place that is neither in biofx nor in torch, None if there is none."""
        frames = (f for f in _running_frames() if not _is_of_biofx(f) and not _is_of_torch(f))
        frame = next(frames, None)
        return None if frame is None else cls(frame)

    @property
    def line(self) -> str:
        """File and line, as ``file:line``."""
        return f"{self._code.co_filename}:{self._frame.f_lineno}"

    @property
    def line_with_source(self) -> str:
        """File, line and the text of that line."""
        return _with_source(self._frame, self._frame.f_lineno)

    @property
    def is_of_torch(self) -> bool:
        """Whether the code is torch's."""
        return _is_of_torch(self._frame)

    @property
    def is_of_capture(self) -> bool:
        """Whether the code is that of biofx, of torch.fx, or of ``copy``, which both of them call."""
        name = str(self._frame.f_globals.get("__name__"))
        return _is_of_biofx(self._frame) or name.startswith("torch.fx.") or name == "copy"

    @property
    def is_of_model(self) -> bool:
        """Whether the code is neither torch's nor that of biofx, nor called on behalf of such."""
        frame: FrameType | None = self._frame
        while frame is not None and frame.f_code.co_filename in _ON_BEHALF:
            frame = frame.f_back
        return frame is not None and not _is_of_torch(frame) and not _is_of_biofx(frame)

    @property
    def is_operand(self) -> bool:
        """Whether the attribute that is read goes straight into arithmetic, and nowhere else."""
        return self._frame.f_lasti in _operands_read(self._code)

    @property
    def formats_numbers(self) -> bool:
        """Whether the code puts numbers into texts with ``%``, which reads them without asking."""
        return _formats_numbers(self._code)

    @property
    def queries_type(self) -> bool:
        """Whether the line asks for a type itself, and not a function of torch that it calls."""
        if "MATCH" in self._opname:
            return True
        line = linecache.getline(self._code.co_filename, self._frame.f_lineno)
        return any(name in (line or self._code.co_names) for name in _TYPE_QUERIES)

    @property
    def is_a_call(self) -> bool:
        """Whether an attribute is looked up by a call (``hasattr``, ``getattr``) and not by a dot."""
        return "CALL" in self._opname

    @property
    def compares_identity_next(self) -> bool:
        """Whether what is returned here will be compared with None, True or False by identity."""
        for given, *after in _in_threes(self._code):
            if given.offset == self._frame.f_lasti:
                if after and after[0].opname.startswith(_STORES):
                    return str(after[0].argval) in names_compared(self._code)
                return _compares_with_constant(after)
        return False

    @property
    def compares_text_next(self) -> bool:
        """Whether the text that is made here is compared, looked for or looked up at once."""
        rest = (step for step in _steps(self._code) if step.offset >= self._frame.f_lasti)
        making_text = ("FORMAT", "CONVERT", "BUILD_STRING", "LOAD_CONST", "CALL")
        after = next((step.opname for step in rest if not step.opname.startswith(making_text)), "")
        return after in ("COMPARE_OP", "CONTAINS_OP", "BINARY_SUBSCR")

    @property
    def _opname(self) -> str:
        return dis.opname[self._code.co_code[self._frame.f_lasti]]


def method_running(error: Exception | None, modules: Container[int]) -> tuple[nn.Module, str] | None:
    """Return the innermost module whose own method runs, and file, line and text of the line.

    Args:
        error: an exception, to look where it came from instead of at what runs now.
        modules: ids of the modules in question.
    """
    if error is None:
        frames = [(frame, frame.f_lineno) for frame in _running_frames()]
    else:
        frames = list(traceback.walk_tb(error.__traceback__))[::-1]
    for frame, line in frames:
        first = frame.f_code.co_varnames[:1]  # self, by whatever name
        module = frame.f_locals.get(first[0]) if first else None
        is_method = id(module) in modules and hasattr(type(module), frame.f_code.co_name)
        if is_method and isinstance(module, nn.Module) and not _is_of_torch(frame):
            return module, _with_source(frame, line)
    return None


def _running_frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _with_source(frame: FrameType, line: int) -> str:
    file = frame.f_code.co_filename
    source = linecache.getline(file, line).strip()
    return f"{file}:{line} ({source})" if source else ""


def _is_of_torch(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(_TORCH_FOLDER)


def _is_of_biofx(frame: FrameType) -> bool:
    in_capture = frame.f_code.co_filename.startswith(_OWN_FOLDER)  # by whatever name: code may be replaced
    return in_capture or is_name_of_biofx(str(frame.f_globals.get("__name__")))


def is_name_of_biofx(module: str) -> bool:
    """Whether a module of Python is part of biofx; the models of its demo count as the user's."""
    return module.startswith("biofx.") and not module.startswith("biofx.demo")


# instructions

_STORES = ("STORE_FAST", "STORE_DEREF")
_LOADS = ("LOAD_FAST", "LOAD_DEREF")
_ATTRIBUTE_LOADS = ("LOAD_ATTR", "LOAD_METHOD")
_JUMPS = ("IF_NONE", "IF_NOT_NONE")
_COMPARISONS = frozenset(number for name, number in dis.opmap.items() if name.endswith(("IS_OP", *_JUMPS)))
_SILENT = frozenset(
    {
        *("CACHE", "NOP", "EXTENDED_ARG", "COPY", "TO_BOOL", "PRECALL", "PUSH_NULL", "RESUME", "NOT_TAKEN"),
    }
)


@functools.lru_cache(maxsize=4096)
def names_compared(code: CodeType) -> frozenset[str]:
    """Return the local names that code compares with None, True or False by identity."""
    found = set()
    for loaded, *after in _in_threes(code):
        if loaded.opname.startswith(_LOADS) and _compares_with_constant(after):
            names = loaded.argval if isinstance(loaded.argval, tuple) else (loaded.argval,)
            found.add(str(names[-1]))
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def catches_exceptions(code: CodeType) -> bool:
    """Whether code has an ``except`` clause for a class of exceptions."""
    return any(step.opname in ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH") for step in _steps(code))


@functools.lru_cache(maxsize=4096)
def _compares_two_names(code: CodeType) -> bool:
    """Whether code asks whether two of its local names refer to one object."""
    for three in _in_threes(code):
        loads = list(itertools.takewhile(lambda step: step.opname.startswith(_LOADS), three))
        names = sum(len(step.argval) if isinstance(step.argval, tuple) else 1 for step in loads)
        if names == 2 and [step.opname for step in three[len(loads) :]][:1] == ["IS_OP"]:
            return True
    return False


@functools.lru_cache(maxsize=4096)
def _operands_read(code: CodeType) -> frozenset[int]:
    """Return the offsets at which code reads an attribute that is an operand, as in ``x * self.k``."""
    steps, found = _steps(code), set()
    for read, *after in zip(steps, steps[1:], steps[2:], strict=False):
        if read.opname == "LOAD_ATTR":
            operation = after[1 if after[0].opname.startswith(_LOADS) else 0]
            if operation.opname == "BINARY_OP" and operation.argrepr in ("+", "-", "*", "/", "**"):
                found.add(read.offset)
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def _formats_numbers(code: CodeType) -> bool:
    has_pattern = any(isinstance(constant, str) and "%" in constant for constant in code.co_consts)
    return has_pattern and any(step.argrepr in ("%", "%=") for step in _steps(code))


@functools.lru_cache(maxsize=4096)
def _steps(code: CodeType) -> tuple[dis.Instruction, ...]:
    """Return the instructions that do something with values."""
    return tuple(step for step in dis.get_instructions(code) if step.opname not in _SILENT)


@functools.lru_cache(maxsize=4096)
def _in_threes(code: CodeType) -> tuple[tuple[dis.Instruction, ...], ...]:
    """Return each instruction with the two after it; none if the code compares no identities."""
    if not _COMPARISONS.intersection(code.co_code[::2]):
        return ()
    steps = _steps(code)
    return tuple(steps[place : place + 3] for place in range(len(steps)))


def _compares_with_constant(after: Sequence[dis.Instruction]) -> bool:
    """Whether the next instructions compare what is on the stack with a constant by identity."""
    if after and after[0].opname.endswith(_JUMPS):
        return True
    names = [step.opname for step in after]
    return names == ["LOAD_CONST", "IS_OP"] and isinstance(after[0].argval, (bool, type(None)))


# names

ANYTHING = "*"
"""The owner of a weight that has no name in the code."""
_LIBRARIES = ("torch.", "builtins.", "typing.", "collections.", "functools.", "math.", "numpy.")
_CHANGING_METHODS = frozenset(
    {
        *("append", "appendleft", "extend", "insert", "pop", "popleft", "popitem", "remove", "clear"),
        *("update", "setdefault", "add", "discard"),
    }
)


def _once_a_class(function: Callable[[Any], Found]) -> Callable[[Any], Found]:
    """Remember the answer for each class as long as it exists: each graph module has a class of its own."""
    known: WeakKeyDictionary[type, Found] = WeakKeyDictionary()

    @functools.wraps(function)
    def once(kind: type) -> Found:
        if kind not in known:
            known[kind] = function(kind)
        return known[kind]

    return once


def names_mentioned(kind: type[nn.Module]) -> frozenset[str]:
    """Return the attributes, globals and texts that the forward of a class, and what it calls, mention."""
    return frozenset(name for code in _code_of_class(kind) for name in _names(code))


def methods_mentioned(kind: type[nn.Module]) -> frozenset[str]:
    """Return what the forward of a class mentions of what the class or its bases define."""
    bases = bases_outside_torch(kind)
    return names_mentioned(kind) & {name for base in bases for name in vars(base)}


@_once_a_class
def weights_mentioned(kind: type[nn.Module]) -> frozenset[str]:
    """Return whose weights the forward of a class mentions: ``"fc"`` for ``self.fc.weight``.

    Its own is left out, and so is one of which the type, the device or the shape is read alone;
    :data:`ANYTHING` for that of something without a name, as in ``layer.weight``.
    """
    found: set[str] = set()
    for code in _code_of_class(kind):
        steps = list(dis.get_instructions(code))
        for before, step, after in zip(steps, steps[1:], steps[2:], strict=False):
            if after.opname.startswith(_ATTRIBUTE_LOADS) and after.argval in _NOT_OF_VALUES:
                continue
            if "ATTR" in step.opname and is_a_weight(step.argval):
                if before.opname.startswith(_ATTRIBUTE_LOADS):
                    found.add(str(before.argval))
                elif before.argval != "self":
                    found.add(ANYTHING)
    return frozenset(found)


_NOT_OF_VALUES = frozenset({"dtype", "device", "shape", "ndim", "requires_grad"})
"""Attributes of a tensor that its values do not decide."""


def is_a_weight(name: object) -> bool:
    """Whether an attribute is the weight of a layer of torch's, or one of its weights."""
    return name in ("weight", "in_proj_weight", "all_weights", "_flat_weights") or str(name).startswith(
        ("weight_ih", "weight_hh")
    )


@_once_a_class
def attributes_changed(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of attributes, of any object, to which the forward of a class may assign."""
    found: set[str] = set()
    for code in _code_of_class(kind):
        before: list[str] = []
        for step in dis.get_instructions(code):
            if step.opname in ("STORE_ATTR", "DELETE_ATTR"):
                found.add(str(step.argval))
            elif step.opname == "STORE_SUBSCR" or step.argval in _CHANGING_METHODS:
                found.update(before)
            if step.opname.startswith(_ATTRIBUTE_LOADS):
                before = [str(step.argval)]
    return frozenset(found)


@_once_a_class
def compares_identities(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class, or what it calls, asks whether two values are one object."""
    functions = () if kind.__module__.startswith("torch.") else _functions_of(kind)
    own = (f for f in functions if not f"{f.__module__}.".startswith(_LIBRARIES))
    return any(_compares_two_names(code) for f in own for code in _with_inner(f.__code__))


def globals_mentioned(
    kind: type[nn.Module], *, of_libraries: bool = False
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the globals that the forward of a class, and what it calls, mention: where, and the name.

    Args:
        kind: the class.
        of_libraries: whether functions of installed packages count, and not only those of the package that
            brings the class.
    """
    own = packages_of([kind])
    for function in _functions_of(kind, through_modules=True):
        package = str(function.__module__).partition(".")[0]
        if of_libraries:
            counts = not f"{function.__module__}.".startswith(_LIBRARIES)
        else:
            counts = package not in ("torch", "builtins") and (package in own or not is_installed(package))
        if counts:
            names = {name for code in _with_inner(function.__code__) for name in code.co_names}
            yield from ((function.__globals__, name) for name in names & function.__globals__.keys())


def _code_of_class(kind: type[nn.Module]) -> Iterator[CodeType]:
    """Yield the code of a forward, and of methods and functions that it may call."""
    for function in _functions_of(kind):
        yield from _with_inner(function.__code__)


def _functions_of(kind: type[nn.Module], *, through_modules: bool = False) -> Iterator[FunctionType]:
    """Yield the functions that a forward may call; also those of modules of Python if asked to."""
    seen: set[CodeType] = set()
    functions: list[Any] = [kind.forward]
    while functions:
        function = _unwrapped(functions.pop())
        if type(function) is not FunctionType or function.__code__ in seen:
            continue
        seen.add(function.__code__)
        yield function
        names = list(_names(function.__code__))
        spaces = [function.__globals__]
        spaces += _modules_among(names, function.__globals__) if through_modules else ()
        for name in names:
            for called in map(_unwrapped, (*_methods(kind, name), *(space.get(name) for space in spaces))):
                if type(called) is FunctionType and not f"{called.__module__}.".startswith(_LIBRARIES):
                    functions.append(called)


def _unwrapped(function: Any) -> Any:
    while "__wrapped__" in attributes_of(function):
        function = attributes_of(function)["__wrapped__"]
    return function


def _modules_among(names: Iterable[str], space: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the globals of modules of Python, as ``module.function`` looks them up."""
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
