"""When plasticity rules run, and what is told of each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from biofx.options import Range
from biofx.plasticity.bio_module import BioModule


@dataclass(frozen=True)
class Rule:
    """When a plasticity rule runs.

    Raises:
        OptionError: ``every`` is not positive, ``after`` negative, or ``until`` not past ``after``.
    """

    name: str
    """A method that the model's layers offer, e.g. ``"rejuvenate_weights"``."""
    every: int = 1
    """Optimizer steps from one run to the next, a count >= 1."""
    after: int = 0
    """Optimizer steps before the first run, a count."""
    until: int | None = None
    """Optimizer steps after which it no longer runs; None for no end."""

    def __post_init__(self) -> None:
        Range(1, whole=True).check(f"rule {self.name!r}: every", self.every)
        Range(0, whole=True).check(f"rule {self.name!r}: after", self.after)
        if self.until is not None:
            Range(self.after + 1, whole=True).check(f"rule {self.name!r}: until", self.until)

    def is_due(self, step: int) -> bool:
        """Whether it runs at the optimizer's step of that number, counted from 0."""
        past_end = self.until is not None and step >= self.until
        return step >= self.after and not past_end and (step - self.after) % self.every == 0


@dataclass
class LayerStep:
    """What one optimizer step did to one weight."""

    state: BioModule
    gradient_norm: float
    """L2 norm of the gradient as backward left it, factors in the graph included; NaN if not asked for."""
    update_norm: float
    """L2 norm of what the step changed in the weight, rules on weights left out; NaN if not asked for."""
    touched: dict[str, int] = field(default_factory=dict)
    """Synapses that each rule touched, by the rule's name."""


Observer = Callable[[int, Mapping[str, LayerStep]], object]
"""Called after each step with its number, from 0, and what it did to each weight, by path.

An observer may have two methods more: ``watch(model)``, called once by :func:`attach`, and
``is_due(step)``, whether it wants the norms of that step, which cost a pass over each weight.
"""


def wants(observer: Observer, step: int) -> bool:
    """Whether an observer wants the norms of a step."""
    return not hasattr(observer, "is_due") or bool(observer.is_due(step))
