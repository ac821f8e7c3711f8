"""What the rules remember of one weight: counts, target strengths, dampening.

None of it is a buffer, so averages of the buffers of models do not change it. In a model's state dict, counts
and the memory of each unit are one tensor, which exists from the start and always has one size. The memory of
each synapse would be as large as the weight: it is saved with the attachment, as an optimizer's state is with
the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from biofx.errors import PlasticityError

_COUNTS = 2
_EXACT = 2**53
"""Up to here float64 represents every count."""


@dataclass
class RuleMemory:
    """The memory of one weight's rules."""

    steps: int = 0
    """Calls of ``update_fuzzy_learning_rates`` so far, a count."""
    events: int = 0
    """Random events so far, a count."""
    target_strength: Tensor | None = None
    """Total input strength of each unit that synaptic scaling maintains, shape ``(units,)``."""
    dampening: Tensor | None = None
    """What crystallization multiplies each synapse's rate by, in (0, 1], shaped like the weight; only where
    the weight has no factor for each synapse that could be dampened itself."""

    def to_tensor(self, units: int) -> Tensor:
        """Return counts and target strengths as float64 numbers that show whether they were averaged.

        The last is the sum of the squares of all others: the square of an average is less than the average
        of the squares, unless all are equal.

        Args:
            units: of the weight, a count; where it has no target strengths, or is computed now, each is 0.
        """
        numbers = torch.zeros(_COUNTS + units, dtype=torch.float64)
        numbers[0], numbers[1] = self.steps, self.events
        if self.target_strength is not None and self.target_strength.shape == (units,):
            numbers[_COUNTS:] = self.target_strength
        return torch.cat((numbers, numbers.square().sum().reshape(1)))

    def take(self, saved: Any, units: int, weight: Tensor | None) -> None:
        """Load what :meth:`to_tensor` returned; an average, or anything else, changes nothing.

        Args:
            saved: what was saved.
            units: of the weight, a count.
            weight: gives device and dtype of the target strengths; None for no target strengths.
        """
        if not isinstance(saved, Tensor) or saved.shape != (_COUNTS + units + 1,) or saved.is_meta:
            return
        numbers = saved.detach().cpu().double()
        counts, strengths, squares = numbers[:_COUNTS], numbers[_COUNTS:-1], numbers[:-1].square().sum()
        whole = bool(((counts >= 0) & (counts < _EXACT) & (counts == counts.floor())).all())
        if not whole or not torch.isclose(squares, numbers[-1], rtol=1e-14, atol=0):
            return
        self.steps, self.events = (int(count) for count in counts)
        self.target_strength = None
        if weight is not None and bool(strengths.any()):
            self.target_strength = strengths.to(weight.device, weight.dtype)

    def to_plain(self) -> dict[str, Any]:
        """Return everything by name: numbers, and tensors or None."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def check(self, saved: Any, units: int, shape: torch.Size) -> None:
        """Check that something was returned by :meth:`to_plain` for a weight of this shape.

        Raises:
            PlasticityError: it was not.
        """
        if not isinstance(saved, Mapping) or set(saved) != set(self.__dataclass_fields__):
            raise PlasticityError(f"expected {', '.join(self.__dataclass_fields__)}, found {saved!r}")
        for name in ("steps", "events"):
            if type(saved[name]) is not int or saved[name] < 0:
                raise PlasticityError(f"{name}: expected a count, found {saved[name]!r}")
        for name, expected in (("target_strength", (units,)), ("dampening", tuple(shape))):
            held = saved[name]
            if held is not None and not (isinstance(held, Tensor) and tuple(held.shape) == expected):
                found = tuple(held.shape) if isinstance(held, Tensor) else held
                raise PlasticityError(f"{name}: expected a tensor of shape {expected}, found {found!r}")

    def restore(self, saved: Mapping[str, Any], device: torch.device) -> None:
        """Load what :meth:`check` has accepted; tensors are copied."""
        for name, value in saved.items():
            copied = value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
            setattr(self, name, copied)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move and convert the tensors as buffers of a module, except that they keep their values."""
        for name in ("target_strength", "dampening"):
            held = getattr(self, name)
            if held is not None:
                like = fn(held)
                setattr(self, name, None if like.is_meta else held.to(like.device, like.dtype))
