"""A pause of Python's garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_left() -> Iterator[None]:
    """Collect no garbage until the end of the block, unless nothing is collected anyway.

    A rewrite makes some hundred objects for each layer, most of which stay, and the collector would look at
    them again and again, for a sixth of the time. What is in no circle is freed at once all the same.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
