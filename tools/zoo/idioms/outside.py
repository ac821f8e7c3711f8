"""What a forward changes that is neither a tensor nor an attribute of a module."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor

from idioms.body import Body


class OwnPythonGenerator(Body):
    """Draws from a generator of Python's that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x) * self.random.random())


class OwnNumpyGenerator(Body):
    """Draws from a generator of NumPy's that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.random = numpy.random.default_rng(0)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x) * self.random.random())


class OwnTorchGenerator(Body):
    """Draws from a generator of torch's that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.random = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x) * torch.rand(1, generator=self.random))


CALLS: list[int] = []


class WritesAGlobal(Body):
    """Counts its calls in a global."""

    def forward(self, x: Tensor) -> Any:
        CALLS.append(1)
        return self.out(self.fc(x) + len(CALLS) % 2)


class WritesItsClass(Body):
    """Counts its calls in an attribute of its class."""

    calls: ClassVar[int] = 0

    def forward(self, x: Tensor) -> Any:
        type(self).calls += 1
        return self.out(self.fc(x) + type(self).calls % 2)


IDIOMS = (OwnPythonGenerator, OwnNumpyGenerator, OwnTorchGenerator, WritesAGlobal, WritesItsClass)
