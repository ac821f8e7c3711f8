"""Questions that no stand-in can answer: ``x is None``, ``x is True``, ``x is y``.

Python compares identities without asking what it compares. So the code of a forward is searched for such
questions. Where it asks about None, the graph checks whenever it runs that there is a value indeed. A text
that is made of a value has forgotten it just so.
"""

from __future__ import annotations

import dis
import functools
import itertools
from collections.abc import Sequence
from types import CodeType, FrameType

_STORES = ("STORE_FAST", "STORE_DEREF")
_LOADS = ("LOAD_FAST", "LOAD_DEREF")
_JUMPS = ("IF_NONE", "IF_NOT_NONE")
_QUESTIONS = frozenset(number for name, number in dis.opmap.items() if name.endswith(("IS_OP", *_JUMPS)))
_SILENT = ("CACHE", "NOP", "EXTENDED_ARG", "COPY", "TO_BOOL", "PRECALL", "RESUME", "NOT_TAKEN")


@functools.lru_cache(maxsize=4096)
def names_asked_about(code: CodeType) -> frozenset[str]:
    """Return the local names that code compares with None, True or False by identity."""
    found = set()
    for loaded, *after in _in_threes(code):
        if loaded.opname.startswith(_LOADS) and _asks(after):
            names = loaded.argval if isinstance(loaded.argval, tuple) else (loaded.argval,)
            found.add(str(names[-1]))
    return frozenset(found)


def is_asked_about_next(frame: FrameType) -> bool:
    """Whether what a frame is being given now will be compared with None, True or False by identity."""
    for given, *after in _in_threes(frame.f_code):
        if given.offset == frame.f_lasti:
            if after and after[0].opname.startswith(_STORES):
                return str(after[0].argval) in names_asked_about(frame.f_code)
            return _asks(after)
    return False


def is_text_asked_about_next(frame: FrameType) -> bool:
    """Whether the text that a frame is making now is compared, looked for or looked up at once."""
    rest = (step for step in dis.get_instructions(frame.f_code) if step.offset >= frame.f_lasti)
    skipped = (*_SILENT, "FORMAT", "CONVERT", "BUILD_STRING", "LOAD_CONST", "CALL")
    after = next((step.opname for step in rest if not step.opname.startswith(skipped)), "")
    return after in ("COMPARE_OP", "CONTAINS_OP", "BINARY_SUBSCR")


@functools.lru_cache(maxsize=4096)
def compares_identities(code: CodeType) -> bool:
    """Whether code asks whether two of its local names stand for one and the same object."""
    for three in _in_threes(code):
        loads = list(itertools.takewhile(lambda step: step.opname.startswith(_LOADS), three))
        names = sum(len(step.argval) if isinstance(step.argval, tuple) else 1 for step in loads)
        if names == 2 and [step.opname for step in three[len(loads) :]][:1] == ["IS_OP"]:
            return True
    return False


@functools.lru_cache(maxsize=4096)
def _in_threes(code: CodeType) -> tuple[tuple[dis.Instruction, ...], ...]:
    """Return each instruction that does something, with the two after it; none if nothing is asked."""
    if not _QUESTIONS.intersection(code.co_code[::2]):
        return ()
    steps = [step for step in dis.get_instructions(code) if step.opname not in _SILENT]
    return tuple(tuple(steps[place : place + 3]) for place in range(len(steps)))


def _asks(after: Sequence[dis.Instruction]) -> bool:
    """Whether the next instructions compare what is on the stack with a constant by identity."""
    if after and after[0].opname.endswith(_JUMPS):
        return True
    names = [step.opname for step in after]
    return names == ["LOAD_CONST", "IS_OP"] and isinstance(after[0].argval, (bool, type(None)))
