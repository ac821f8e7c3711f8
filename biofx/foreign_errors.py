"""Exceptions that come out of our own code, or of what it calls, as errors of ours."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from biofx.errors import BiofxError
from biofx.static_inspection import is_a_file_of_a_library

_OWN_FOLDERS = tuple({str(Path(__file__).parent), str((Path(__file__).parent / "passes").resolve())})
BY_A_PASS = "raised by pass "
"""How the note begins that a pass of the user's own leaves on an exception."""
_LEFT_AS_THEY_ARE = (BiofxError, MemoryError, torch.OutOfMemoryError)


@contextmanager
def foreign_errors_wrapped(kind: type[BiofxError], doing: str) -> Iterator[None]:
    """Raise an error of ours for an exception that none of the user's code has raised.

    What comes out of a function of the user's (a pass, a predicate, an observer) keeps its type.

    Args:
        kind: the class of the error.
        doing: what is being done, for the message.

    Raises:
        BiofxError: of that class, from the exception.
    """
    try:
        yield
    except _LEFT_AS_THEY_ARE:
        raise
    except Exception as error:
        place = place_of_ours(error)
        if place is None or any(str(note).startswith(BY_A_PASS) for note in getattr(error, "__notes__", ())):
            raise
        raise kind(
            f"{doing} failed with {type(error).__name__}: {error} ({place}). This is a fault of biofx; name "
            "the module that it is about in opaque=[…], or leave it out with exclude=[…], to go on without"
        ) from error


def place_of_ours(error: BaseException) -> str | None:
    """Return the line of ours out of which an exception came, None if it came out of the user's code."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(_OWN_FOLDERS):
            return f"{Path(frame.filename).name}:{frame.lineno}"
        if not is_a_file_of_a_library(frame.filename):
            return None
    return None
