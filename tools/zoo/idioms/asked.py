"""What Python asks about a value without calling anything of it: its type, whether it is None."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from idioms.body import Body


class TypeOfTheInput(Body):
    """``type(x)``, which is not ``isinstance``."""

    def forward(self, x: Tensor) -> Any:
        if type(x) is Tensor:
            x = x * 2
        return self.out(self.fc(x))


class TypeAmongOthers(Body):
    """The type of what comes in, looked for in a tuple."""

    def forward(self, x: Any) -> Any:
        if type(x) in (list, tuple):
            x = x[0]
        return self.out(self.fc(x))


class TypeOfAResult(Body):
    """The type of what a layer returns."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)
        if type(hidden) == torch.Tensor:  # noqa: E721
            hidden = hidden * 2
        return self.out(hidden)


class CallsWhatCanBeCalled(Body):
    """An argument that may be a function."""

    def forward(self, x: Any) -> Any:
        if callable(x):
            x = x()
        return self.out(self.fc(x))


class NeedsAMask(Body):
    """An argument without a default that may be None."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        hidden = self.fc(x)
        if mask is not None:
            hidden = hidden + 1
        return self.out(hidden)


class HandsAMaskOn(nn.Module):
    """The same one module further in."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = NeedsAMask()

    def forward(self, x: Tensor, mask: Tensor | None) -> Any:
        return self.inner(x, mask)


class EntryThatIsNone(Body):
    """An entry of a dict that may be None."""

    def forward(self, given: dict[str, Any]) -> Any:
        hidden = self.fc(given["x"])
        return self.out(hidden if given["mask"] is None else hidden * 2)


class ReturnsNone(nn.Module):
    """Returns nothing for some values, and so stays in Python."""

    def forward(self, x: Tensor) -> Any:
        return x if x.sum() > 0 else None


class ResultThatIsNone(Body):
    """A result that is None for some values."""

    def __init__(self) -> None:
        super().__init__()
        self.chosen = ReturnsNone()

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)
        found = self.chosen(hidden.mean(0) * 0 - 1)
        if found is not None:
            hidden = hidden + found
        return self.out(hidden)


class EntryThatMayBeMissing(Body):
    """An entry of a dict that may be missing, asked for by ``get``."""

    def forward(self, given: dict[str, Any]) -> Any:
        hidden = self.fc(given["x"])
        mask = given.get("mask")
        return self.out(hidden if mask is None else hidden * 2)


class OneOrTwo(Body):
    """Two arguments that may be one and the same tensor."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.out(self.fc(x if x is y else x + y))


class ContiguousOrNot(Body):
    """A result that may be what went in."""

    def forward(self, x: Tensor) -> Any:
        y = x.contiguous()
        return self.out(self.fc(y if y is x else y * 2))


class TextOfAShape(Body):
    """A decision by what a shape looks like as a text."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)
        return self.out(hidden if "6" in f"{hidden.shape}" else hidden * 2)


IDIOMS = (
    *(TypeOfTheInput, TypeAmongOthers, TypeOfAResult, CallsWhatCanBeCalled, NeedsAMask, HandsAMaskOn),
    *(EntryThatIsNone, ResultThatIsNone, EntryThatMayBeMissing, OneOrTwo, ContiguousOrNot, TextOfAShape),
)
