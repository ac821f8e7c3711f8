"""What forwards find under the name ``math`` while they are captured: functions that follow numbers.

Those of Python's read the number out of whatever is one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import BuiltinFunctionType
from typing import Any

from torch import nn

from biofx.capture.tracked import Number, computed

_FUNCTIONS = dict(vars(math))
"""Whatever else is put in their place while a forward is traced."""


class _Following:
    """Stands for the module ``math``."""

    def __getattr__(self, name: str) -> Any:
        return _following(name) if callable(getattr(math, name)) else getattr(math, name)


def _following(name: str) -> Callable[..., Any]:
    original = _FUNCTIONS[name]

    def function(*args: Any, **kwargs: Any) -> Any:
        number = next((value for value in args if isinstance(value, Number)), None)
        if number is None or kwargs:
            return getattr(math, name)(*args, **kwargs)  # as it is just now: torch.fx puts its own there
        return computed(original, args, number.frame)

    return function


@contextmanager
def maths_followed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the source files that define the classes of some modules find such functions meanwhile."""
    files = {kind.__module__ for kind in {type(module) for module in modules} for kind in kind.__mro__}
    spaces = [
        vars(sys.modules[name])
        for name in files
        if name in sys.modules and name.partition(".")[0] not in ("torch", "builtins", "biofx")
    ]
    replaced = [
        (space, name, value)
        for space in spaces
        for name, value in space.items()
        if value is math or (type(value) is BuiltinFunctionType and value.__module__ == "math")
    ]
    for space, name, value in replaced:
        space[name] = _Following() if value is math else _following(value.__name__)
    try:
        yield
    finally:
        for space, name, value in replaced:
            space[name] = value
