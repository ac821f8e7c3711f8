"""Following ``torch.finfo`` and ``torch.iinfo``: what they say of the type of a tensor, a graph asks anew.

Neither asks whether it is handed a stand-in: they would read a number of a type out of whatever it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def limits_followed(of: Callable[[Any, str], Any], is_stand_in: Callable[[Any], bool]) -> Iterator[None]:
    """Let the numbers of stand-ins for types be what ``of`` says.

    Args:
        of: from a stand-in and the name of a number (``min``, ``eps``, …) to what is to be used.
        is_stand_in: whether an argument is one.
    """
    finfo, iinfo = torch.finfo, torch.iinfo

    def followed(kind: Any) -> Callable[..., Any]:
        def limits(*args: Any, **kwargs: Any) -> Any:
            asked = [*args, *kwargs.values()][:1]
            if asked and is_stand_in(asked[0]):
                return _Limits(lambda name: of(asked[0], name))
            return kind(*args, **kwargs)

        return limits

    torch.finfo, torch.iinfo = followed(finfo), followed(iinfo)  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.finfo, torch.iinfo = finfo, iinfo  # type: ignore[misc]


class _Limits:
    """Has the numbers of a type as its attributes."""

    def __init__(self, of: Callable[[str], Any]) -> None:
        self._of = of

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._of(name)
