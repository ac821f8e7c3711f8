"""Training and evaluation: what differs between them, and what is drawn at random."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from idioms.body import Body


class FunctionalDropout(Body):
    """A flag that is passed on."""

    def forward(self, x: Tensor) -> Any:
        return self.out(F.dropout(self.fc(x), 0.5, self.training))


class FunctionalDropoutAlwaysOn(Body):
    """A flag that is a constant: dropout for the uncertainty of a prediction."""

    def forward(self, x: Tensor) -> Any:
        return self.out(F.dropout(self.fc(x), 0.5, training=True))


class DropPath(nn.Module):
    """Drops its input for whole examples."""

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return x
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.7)
        return x * mask / 0.7


class StochasticDepth(Body):
    """A branch that is taken in training only, in a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Any:
        return self.out(self.drop_path(self.fc(x)))


class LayerDrop(nn.Module):
    """Layers that are left out by a number of Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            if self.training and random.random() < 0.5:
                continue
            x = layer(x).relu()
        return x


class NumpyNoise(Body):
    """Noise that NumPy draws."""

    def forward(self, x: Tensor) -> Any:
        noise = torch.from_numpy(numpy.random.standard_normal(6)).float()
        return self.out(self.fc(x) + noise)


class AuxiliaryHead(Body):
    """More outputs in training."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x).relu()
        return (self.out(hidden), self.auxiliary(hidden)) if self.training else self.out(hidden)


class FrozenNormalisation(Body):
    """A batch norm that stays in evaluation when the model goes to training."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(6)
        self.train()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x: Tensor) -> Any:
        return self.out(self.bn(self.fc(x)))


class FunctionalNormalisation(Body):
    """Running statistics that a function updates."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Any:
        bn = self.bn
        hidden = F.batch_norm(
            self.fc(x), bn.running_mean, bn.running_var, bn.weight, bn.bias, bn.training, bn.momentum or 0.0
        )
        return self.out(hidden)


class OutputByMode(Body):
    """Logits in training, probabilities in evaluation."""

    def forward(self, x: Tensor) -> Any:
        scores = self.out(self.fc(x).relu())
        return scores if self.training else scores.softmax(-1)


class NoiseInForward(Body):
    """Random tensors of fixed and of given sizes."""

    def forward(self, x: Tensor) -> Any:
        noise = torch.randn(6) + torch.rand(x.shape[0], 1) + torch.zeros(6).normal_()
        return self.out(self.fc(x) + noise * torch.randn_like(x[:, :1]))


class GumbelSoftmax(Body):
    """Samples that let gradients through."""

    def forward(self, x: Tensor) -> Any:
        return F.gumbel_softmax(self.out(self.fc(x)), tau=0.7, hard=True)


class ReparametrisedSample(Body):
    """A sample from a distribution of torch's in training, its mean otherwise."""

    def forward(self, x: Tensor) -> Any:
        mean, spread = self.fc(x).chunk(2, -1)
        normal = torch.distributions.Normal(mean, spread.exp(), validate_args=False)
        return normal.rsample() if self.training else mean


class RandomPermutation(Body):
    """A shuffled batch, as in mixup."""

    def forward(self, x: Tensor) -> Any:
        mixed = x[torch.randperm(x.shape[0])]
        return self.out(self.fc(0.6 * x + 0.4 * mixed))


class AnnealedByCounter(Body):
    """A weight that a buffer of calls decides."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.calls += 1
        return self.out(self.fc(x) * torch.sigmoid(self.calls))


IDIOMS = (
    *(FunctionalDropout, FunctionalDropoutAlwaysOn, StochasticDepth, LayerDrop, NumpyNoise, AuxiliaryHead),
    *(FrozenNormalisation, FunctionalNormalisation, OutputByMode, NoiseInForward, GumbelSoftmax),
    *(ReparametrisedSample, RandomPermutation, AnnealedByCounter),
)
