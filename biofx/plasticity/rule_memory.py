"""What the rules remember of one weight: counts, and what they compare it with or make of its factors.

None of it is a buffer, so that whatever averages the buffers of models leaves it alone. In a model's state
dict, counts and what is kept for each unit are one tensor, there from the start and always of one size. What
is kept for each synapse would be as large as the weight: it is saved with the attachment, as an optimizer's
state is with the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from biofx.errors import PlasticityError

if TYPE_CHECKING:
    from biofx.plasticity.bio_state import BioState

_COUNTS = 2
_EXACT = 2**53
"""Up to here float64 counts without gaps."""


@dataclass
class RuleMemory:
    """The memory of one weight's rules."""

    steps: int = 0
    """Calls of ``update_fuzzy_learning_rates`` so far, a count."""
    events: int = 0
    """Random events so far, a count."""
    target_strength: Tensor | None = None
    """Total input strength of each unit that synaptic scaling keeps up, shape ``(units,)``."""
    dampening: Tensor | None = None
    """What crystallization has made of each synapse's rate, in (0, 1], shaped like the weight; only where the
    weight has no factor for each synapse that could be dampened itself."""

    def to_tensor(self, units: int) -> Tensor:
        """Return counts and target strengths as numbers that an average of several is told apart from.

        They are float64, which clients can calculate with. Last comes the sum of the squares of all others:
        the square of an average is less than the average of the squares, unless all are the same.

        Args:
            units: how many units the weight has, a count; without a target strength of each, as where the
                weight is computed now, each has 0.
        """
        numbers = torch.zeros(_COUNTS + units, dtype=torch.float64)
        numbers[0], numbers[1] = self.steps, self.events
        if self.target_strength is not None and self.target_strength.shape == (units,):
            numbers[_COUNTS:] = self.target_strength
        return torch.cat((numbers, numbers.square().sum().reshape(1)))

    def take(self, saved: Any, units: int, weight: Tensor | None) -> None:
        """Take over what :meth:`to_tensor` returned; what is an average, or no such thing, changes nothing.

        Args:
            saved: what was saved.
            units: how many units the weight has, a count.
            weight: tells the device and the type of target strengths; None without any.
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
        """Check that something is what :meth:`to_plain` returned of a weight of this shape.

        Raises:
            PlasticityError: it is not.
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
        """Take over what :meth:`check` has passed; tensors are copied."""
        for name, value in saved.items():
            copied = value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
            setattr(self, name, copied)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move and convert the tensors as a module's buffers are, but for their values, which stay."""
        for name in ("target_strength", "dampening"):
            held = getattr(self, name)
            if held is not None:
                like = fn(held)
                setattr(self, name, None if like.is_meta else held.to(like.device, like.dtype))


def memory_of(states: Mapping[str, BioState]) -> dict[str, dict[str, Any]]:
    """Return what the rules of each weight remember, by its path, as plain values and tensors."""
    return {path: state.memory.to_plain() for path, state in states.items()}


def take_memory(states: Mapping[str, BioState], saved: Any) -> None:
    """Let rules remember what :func:`memory_of` returned; weights that it does not name keep their own.

    Raises:
        PlasticityError: it names another weight, or does not fit one; nothing has been changed.
    """
    if not isinstance(saved, Mapping):
        raise PlasticityError(f"memory: expected a dict by the paths of weights, found {saved!r}")
    for path, entry in saved.items():
        if path not in states:
            raise PlasticityError(f"memory: found that of {path!r}, which the optimizer does not step here")
        try:
            states[path].memory.check(entry, states[path].units, states[path].weight.shape)
        except PlasticityError as error:
            raise PlasticityError(f"memory of {path!r}: {error}") from error
    for path, entry in saved.items():
        states[path].memory.restore(entry, states[path].weight.device)
