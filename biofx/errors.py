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
├── InvariantError    a transformed model no longer is what its passes made it
└── TorchVersionError torch lacks something that biofx reaches inside of it (also an ImportError)

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
    "TorchVersionError",
]


class BiofxError(Exception):
    """The root of the tree: ``except BiofxError`` catches everything biofx raises on purpose.

    Every message says what was expected, what was found and what to do, and names the layer, the node, or
    file and line of the model where they are known.

    Remedy: that of the class below it that was raised.
    """


class BiofxWarning(UserWarning):
    """Something that biofx does as it was told, and that may not be what is wanted.

    Remedy: do what the message names, or, where the thing is wanted, filter this class:
    ``warnings.filterwarnings("ignore", category=biofx.BiofxWarning)``.
    """


class InputError(BiofxError, TypeError):
    """An argument is not something biofx can take: not a module, a wrapped or half-initialised model.

    Remedy: give the model itself, an initialised instance of a ``torch.nn.Module``, and wrap, compile or
    shard the result. A rewritten model that raises it in a call got a value of another kind than the one it
    was captured with: give ``example_inputs`` of that kind to :func:`biofx.transform`.
    """


class CaptureError(BiofxError):
    """The model's forward cannot be captured as a graph that computes the same thing every time.

    Remedy: give ``example_inputs``, with which calls are recorded where a trace fails; or name the module
    whose forward is in the way in ``opaque``, so that it runs as it is. Raised by a call of a rewritten
    model, an attribute that decided something has changed since: set it back, or transform again with the
    new value.
    """


class OptionError(BiofxError, ValueError):
    """A config field or a pass option is unknown or has a value out of its range.

    Remedy: the message names the nearest field, or the values that are permitted; ``biofx config`` and
    ``biofx passes`` list all of them.
    """


class SelectorError(BiofxError, LookupError):
    """A selector matches nothing in the model, or is not a selector.

    Remedy: take one of the names that come nearest, which the message has, or ask what a selector picks with
    ``biofx explain TARGET SELECTOR``; the forms are in :mod:`biofx.select`.
    """


class PipelineError(BiofxError, ValueError):
    """A pipeline's text, pass names or order make no sense.

    Remedy: ``biofx passes`` lists the names, :mod:`biofx.rewriting.pass_text` has the grammar. A cycle comes
    of passes of one's own whose ``after`` contradict each other.
    """


class PassError(BiofxError):
    """A pass cannot run on this graph, or what it did breaks its own contract.

    Remedy: run what the pass requires before it, which the message names. Where a pass of biofx breaks its
    contract, that is a bug: the reproducer beside the message is a script that shows it to others.
    """


class BisectError(BiofxError):
    """There is no rewrite to find: the predicate is true from the start, never, or now and then.

    Remedy: let the predicate be false for the model as it is and true for the rewritten one, and depend on
    nothing but the model it is given: seed what it draws, and leave out times.
    """


class CheckpointError(BiofxError, ValueError):
    """A checkpoint cannot be written or read, or does not belong to the model or the optimizer.

    Remedy: load into the architecture that was saved, with an optimizer built from ``model.parameters()`` in
    the same groups; of a sharded model use :func:`biofx.checkpoints.save_sharded` and
    :func:`biofx.checkpoints.load_sharded`. Nothing has been changed when it is raised.
    """


class PlasticityError(BiofxError):
    """A plasticity rule cannot be applied: no gradient, no sign, or something the graph does already.

    Remedy: leave the rule to :func:`biofx.attach`, which runs it at the right point of each step, or call it
    where its description says (most of those on gradients: between backward and step). What the graph does
    already, such as scaling gradients, needs no call.
    """


class NonFiniteWeightError(PlasticityError):
    """A weight is NaN or infinite; the message names its layer.

    Remedy: go back to the last checkpoint, and look at what the loss did before: a smaller learning rate or
    clipped gradients. A rule would spread the value to other weights; nothing has been changed.
    """


class InvariantError(BiofxError):
    """Something that a transformed model promises does not hold: a sign, a rate (see ``biofx.check``).

    Remedy: something outside of biofx wrote to weights, signs or factors, or changed the graph. Load the last
    checkpoint, or transform the model again; ``biofx.check(model)`` lists every finding.
    """


class TorchVersionError(BiofxError, ImportError):
    """The installed torch lacks something private that biofx reaches, which another release renamed.

    Remedy: install a release of torch on which biofx was tried, which the message lists, or a newer biofx.
    """


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
