"""What a forward changes that is neither a tensor nor an attribute of a module."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

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


class TakesFromItsArgument(Body):
    """Takes its input out of the caller's dict, and puts its output in."""

    def forward(self, given: dict[str, Any]) -> Any:
        given["out"] = self.out(self.fc(given["x"]))
        return given


class ChoosesAKernel(Body):
    """Attention by one of torch's ways to compute it."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)[None, None]
        with sdpa_kernel(SDPBackend.MATH):
            hidden = functional.scaled_dot_product_attention(hidden, hidden, hidden)
        return self.out(hidden[0, 0])


class SavesTensorsItsWay(Body):
    """Keeps twice of what is saved for the gradient."""

    def forward(self, x: Tensor) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved * 2, lambda saved: saved):
            hidden = self.fc(x).tanh()
        return self.out(hidden)


class CachesParametrizations(Body):
    """Computes a weight once for two calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.nn.utils.parametrizations.weight_norm(self.fc)

    def forward(self, x: Tensor) -> Any:
        with parametrize.cached():
            return self.out(self.fc(x) + self.fc(x * 2))


IDIOMS = (
    *(ChoosesAKernel, SavesTensorsItsWay, CachesParametrizations, TakesFromItsArgument),
    *(OwnPythonGenerator, OwnNumpyGenerator, OwnTorchGenerator, WritesAGlobal, WritesItsClass),
)
