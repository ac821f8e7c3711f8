"""What a forward hands back: classes of the model's own, names, dicts, its input."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from idioms.body import Body


@dataclass
class Result:
    """An output of a class of its own."""

    scores: Tensor
    hidden: Tensor | None = None


class Pair(NamedTuple):
    """An output with names."""

    scores: Tensor
    hidden: Tensor


class ReturnsADataclass(Body):
    """An output of a class of its own."""

    def forward(self, x: Tensor) -> Any:
        return Result(scores=self.out(self.fc(x)))


class ReturnsNames(Body):
    """A named tuple."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)
        return Pair(self.out(hidden), hidden)


class ReturnsADict(Body):
    """Dicts, lists, numbers and None."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)
        return {"scores": self.out(hidden), "more": [hidden, None, (x.shape[0], 2.5)]}


class ReturnsAnOrderedDict(Body):
    """A dict of another class, as segmentation models return."""

    def forward(self, x: Tensor) -> Any:
        return OrderedDict(out=self.out(self.fc(x)), features=x.sum(1))


class ReturnsItsInput(Body):
    """An output that is an input, and one that is a parameter."""

    def forward(self, x: Tensor) -> Any:
        return x, self.out(self.fc(x)), self.fc.weight


class ReturnsNothing(Body):
    """None, where a loss would be if there were labels."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        scores = self.out(self.fc(x))
        loss = None if labels is None else (scores - labels).square().mean()
        return loss, scores


IDIOMS = (
    ReturnsADataclass,
    ReturnsNames,
    ReturnsADict,
    ReturnsAnOrderedDict,
    ReturnsItsInput,
    ReturnsNothing,
)
