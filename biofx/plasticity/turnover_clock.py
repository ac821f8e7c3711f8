"""What the host remembers of a turnover of units, so that a run that replaces none waits for no device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from biofx.operators.observed_inputs import FORWARDS, MAGNITUDE, MEAN, RUNNING_MEAN


class Rows(NamedTuple):
    """Views of what a reader of units has seen."""

    forwards: Tensor
    """A count, ``(channels,)``."""
    magnitude: Tensor
    """The sum of the means of |x| over these, ``(channels,)``."""
    mean: Tensor
    """The sum of the means of x, ``(channels,)``."""
    running: Tensor
    """The running mean of x, ``(channels,)``."""
    since: Tensor
    """All that has been seen since the last run, ``(3, channels)``."""


class TurnoverClock:
    """Numbers that were read from buffers, valid as long as nobody else has written to these.

    torch counts what is written to a tensor. Nothing of it is state: it is not copied nor saved, and is read
    again where a buffer is another one, or has been written to.
    """

    def __init__(self) -> None:
        self._versions: dict[str, tuple[Tensor, int]] = {}
        self._due = 0.0
        self._seen: list[tuple[Tensor, int]] = []
        self._rows: dict[int, tuple[Tensor, int, Rows]] = {}
        self._rates: list[tuple[Tensor, int]] = []
        self._maturity = 0
        self._waits: list[int] = []
        self._ripe = 0
        self._runs = 0
        self._optimizer: Callable[[], object] = lambda: None

    def __reduce__(self) -> Any:
        return TurnoverClock, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> TurnoverClock:
        return TurnoverClock()

    # the optimizer

    def knows(self, optimizer: object) -> bool:
        """Whether this is the optimizer that was met last."""
        return optimizer is self._optimizer()

    def meet(self, optimizer: object) -> None:
        """Remember an optimizer, which holds what it should."""
        self._optimizer = weakref.ref(optimizer)

    # what has been seen

    def have_changed(self, tensors: Sequence[Tensor], age: Tensor) -> bool | None:
        """Whether all have been written to since :meth:`note_seen`; None if that is not known.

        Who has written to the ages, loading a state, may have written to the tensors too.
        """
        if len(self._seen) != len(tensors) or not self._is_current("age", age):
            return None
        for tensor, (known, version) in zip(tensors, self._seen, strict=True):
            if tensor is not known:
                return None
            if tensor._version == version:
                return False
        return True

    def rows(self, number: int, seen: Tensor) -> Rows:
        """Return the rows of what a reader has seen, made anew where it is another tensor than before.

        Args:
            number: of the reader.
            seen: as :func:`~biofx.operators.observed_inputs.observe_inputs` keeps it.
        """
        known = self._rows.get(number)
        if known is None or known[0] is not seen or known[1] != seen.data_ptr():
            made = Rows(seen[FORWARDS], seen[MAGNITUDE], seen[MEAN], seen[RUNNING_MEAN], seen[:RUNNING_MEAN])
            known = self._rows[number] = seen, seen.data_ptr(), made
        return known[2]

    def note_seen(self, tensors: Sequence[Tensor]) -> None:
        """Note that what was written to some tensors has been taken from them."""
        self._seen = [(tensor, tensor._version) for tensor in tensors]

    # ages

    def grow_older(self, age: Tensor) -> None:
        """Add 1 to all ages."""
        known = self._is_current("age", age)
        age.add_(1)
        self._runs += 1
        if known:
            self._note("age", age)

    def mature(self, age: Tensor, maturity: int, rates: Sequence[Tensor], held: Callable[[], Tensor]) -> int:
        """Return how many units are older than the maturity age and not held back, a count.

        Args:
            age: of the units, a count each.
            maturity: the age.
            rates: what holds units back depends on these.
            held: returns which it holds back, bool.
        """
        current = self._is_current("age", age) and self._maturity == maturity
        if current and len(rates) == len(self._rates):
            known = zip(rates, self._rates, strict=True)
            current = all(rate is other and rate._version == version for rate, (other, version) in known)
        else:
            current = False
        if not current:
            waits = (maturity + 1 - age[~held()] if rates else maturity + 1 - age).clamp(min=0)
            self._waits = sorted((wait for wait in waits.tolist() if wait > 0), reverse=True)
            self._ripe, self._runs, self._maturity = len(waits) - len(self._waits), 0, maturity
            self._rates = [(rate, rate._version) for rate in rates]
            self._note("age", age)
        while self._waits and self._waits[-1] <= self._runs:
            self._waits.pop()
            self._ripe += 1
        return self._ripe

    # a number

    def read(self, number: Tensor) -> float:
        """Return the value of a tensor of one number."""
        if not self._is_current("due", number):
            self._due = float(number)
        return self._due

    def write(self, number: Tensor, value: float) -> None:
        """Give a tensor of one number a value."""
        if value != self._due or not self._is_current("due", number):
            number.fill_(value)
            self._due = value
            if number.dtype != torch.float64:
                self._due = float(number)
            self._note("due", number)

    def _is_current(self, name: str, tensor: Tensor) -> bool:
        known = self._versions.get(name)
        return known is not None and known[0] is tensor and known[1] == tensor._version

    def _note(self, name: str, tensor: Tensor) -> None:
        self._versions[name] = tensor, tensor._version
