"""Functions that remember what they returned (``functools.lru_cache``), while a forward is captured.

What such a function returns is kept for the next call with the same arguments. A stand-in must not be: it
would come back after the capture, in the model that went in. So, of arguments that are known, the function is
called as ever and gives what every call of the model gets; of stand-ins it computes anew.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from biofx.capture.python_names import globals_named, lineage_of
from biofx.capture.sized_by_values import leaves
from biofx.capture.tracked import plain
from biofx.unasked import is_of, package_of

_Remembering: Any = functools._lru_cache_wrapper


@contextmanager
def memories_bypassed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let the forwards of some modules find functions that remember no stand-in."""
    replaced: list[tuple[Any, str, Any]] = []
    for kind in {type(module) for module in modules}:
        if package_of(kind) == "torch":
            continue
        for space, name in globals_named(kind):
            if type(space.get(name)) is _Remembering:
                replaced.append((space, name, space[name]))
                space[name] = _WithoutMemory(space[name])
        for base in lineage_of(kind):
            for name, held in list(vars(base).items()):
                if type(held) is _Remembering:
                    replaced.append((base, name, held))
                    setattr(base, name, _WithoutMemory(held))
    try:
        yield
    finally:
        for place, name, held in replaced:
            if is_of(place, type):
                setattr(place, name, held)
            else:
                place[name] = held


class _WithoutMemory:
    """Stands in the place of a function that remembers; no function itself, as that is none."""

    def __init__(self, remembering: Any) -> None:
        self._remembering = remembering
        functools.update_wrapper(self, remembering)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(_may_be_a_stand_in(leaf) for leaf in leaves((args, kwargs))):
            return self._remembering.__wrapped__(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return self._remembering(*args, **kwargs)

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        return self if owner is None else functools.partial(self, owner)


def _may_be_a_stand_in(value: Any) -> bool:
    return is_of(value, (Tensor, torch.fx.Proxy, nn.Module)) or plain(value) is not value
