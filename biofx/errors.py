"""Every error that biofx raises on purpose.

BiofxError
├── InputError        what was handed in is not something biofx can take (also a TypeError)
├── CaptureError      the model's forward cannot be written down as a graph without losing something
├── OptionError       a field of a config or an option of a pass is unknown or out of range (a ValueError)
├── SelectorError     a pattern selects nothing, or is not a pattern (also a LookupError)
├── PipelineError     a pipeline text is malformed, a pass unknown, an order cyclic (also a ValueError)
├── BisectError       there is nothing to find, or the answers contradict each other
├── PassError         a pass was run on a graph it cannot take, or broke its own contract
├── CheckpointError   a file or state cannot be saved, or does not fit what it is loaded into (a ValueError)
├── PlasticityError   a plasticity rule cannot be applied
│   └── NonFiniteWeightError  a weight is NaN or infinite
└── InvariantError    a transformed model no longer is what its passes made it

:class:`BiofxWarning` is the class of every warning, but for the deprecation of names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = [
    "BiofxError",
    "BiofxWarning",
    "BisectError",
    "CaptureError",
    "CheckpointError",
    "InputError",
    "InvariantError",
    "NonFiniteWeightError",
    "OptionError",
    "PassError",
    "PipelineError",
    "PlasticityError",
    "SelectorError",
]


class BiofxError(Exception):
    """The root of the tree: ``except BiofxError`` catches everything biofx raises on purpose."""


class BiofxWarning(UserWarning):
    """Something that biofx does as it was told, and that may not be what is wanted."""


class InputError(BiofxError, TypeError):
    """An argument is not something biofx can take: not a module, a wrapped or half-initialised model."""


class CaptureError(BiofxError):
    """The model's forward cannot be captured as a graph that computes the same thing every time."""


class OptionError(BiofxError, ValueError):
    """A config field or a pass option is unknown or has a value out of its range."""


class SelectorError(BiofxError, LookupError):
    """A selector matches nothing in the model, or is not a selector."""


class PipelineError(BiofxError, ValueError):
    """A pipeline's text, pass names or order make no sense."""


class PassError(BiofxError):
    """A pass cannot run on this graph, or what it did breaks its own contract."""


class BisectError(BiofxError):
    """There is no rewrite to find: the predicate is true from the start, never, or now and then."""


class CheckpointError(BiofxError, ValueError):
    """A checkpoint cannot be written or read, or does not belong to the model or the optimizer."""


class PlasticityError(BiofxError):
    """A plasticity rule cannot be applied: no gradient, no sign, or something the graph does already."""


class NonFiniteWeightError(PlasticityError):
    """A weight is NaN or infinite; the message names its layer."""


class InvariantError(BiofxError):
    """Something that a transformed model promises does not hold: a sign, a rate (see ``biofx.check``)."""


def suggest(unknown: str, known: Iterable[str], *, limit: int = 3) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for the names nearest to ``unknown``, or an empty string.

    >>> suggest("layer1.con1", ["layer1.conv1", "fc"])
    "; did you mean 'layer1.conv1'?"
    """
    names = list(dict.fromkeys(known))
    nearest = difflib.get_close_matches(unknown, names, n=limit, cutoff=0.6)
    if not nearest:
        nearest = [name for name in names if difflib.get_close_matches(unknown, re.split("[._]", name), 1)][
            :limit
        ]
    return f"; did you mean {' or '.join(repr(name) for name in nearest)}?" if nearest else ""


def add_note(error: BaseException, note: str) -> None:
    """Attach ``note`` to an exception that is not ours, where the Python at hand can show one (3.11+)."""
    if hasattr(error, "add_note"):
        error.add_note(note)
