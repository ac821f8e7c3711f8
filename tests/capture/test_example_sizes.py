"""Models whose way depends on the number of samples, recorded with some number and called with others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.capture.example_sizes import Axis, axes_of, is_of_samples

OFF = {"fuzzy_lr_distribution": "baseline"}


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.norm = nn.Linear(4, 4), nn.Linear(4, 2), nn.BatchNorm1d(4)
        self.special = 3

    def example(self, count: int) -> Tensor:
        return torch.randn(count, 4, generator=torch.Generator().manual_seed(count))


class OtherwiseAlone(Body):
    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x) if x.shape[0] > 1 else self.fc(x).reshape(1, -1) * 2)


class Squeezed(Body):
    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x).squeeze())


class NormalisedInTraining(Body):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        return self.out(self.norm(h) if self.training and len(x) > 1 else h)


class ANumberApart(Body):
    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x)) * (3 if x.size(0) == self.special else 1)


class InParts(Body):
    def forward(self, x: Tensor) -> Any:
        return torch.cat([self.out(self.fc(part)) * 2 for part in x.split(16)]) if len(x) > 16 else x[:, :2]


class OddOnes(Body):
    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x)) * 2 if x.shape[0] % 2 else self.out(self.fc(x))


class SecondAxis(Body):
    def example(self, count: int) -> Tensor:
        return torch.randn(5, count, 4, generator=torch.Generator().manual_seed(count))

    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x) * 2 if x.shape[1] == 1 else self.fc(x))


class Shifted(Body):
    def forward(self, x: Tensor) -> Any:
        return self.out(self.fc(x)) * max(1, x.shape[0] - 2)


class NormalisedAlways(Body):
    def forward(self, x: Tensor) -> Any:
        return self.out(self.norm(self.fc(x)))


KINDS = [
    *(OtherwiseAlone, Squeezed, NormalisedInTraining, ANumberApart, InParts, OddOnes, SecondAxis, Shifted),
    NormalisedAlways,
]


@pytest.mark.parametrize("recorded_with", [1, 2, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_samples_is_taken_as_the_model_takes_it(kind: Any, recorded_with: int) -> None:
    model = kind()
    bio_model, _ = biofx.transform(model, OFF, example_inputs=model.example(recorded_with))
    for training in (True, False):
        for count in (1, 2, 3, 4, 5, 7, 16, 17):
            bio_model.load_state_dict(model.train(training).state_dict(), strict=False)
            x = model.example(count)
            if kind is NormalisedAlways and training and count == 1:
                for either in (model, bio_model.train()):
                    with pytest.raises(ValueError, match="more than 1 value per channel"):
                        either(x)
                continue
            expected = model(x)
            torch.testing.assert_close(bio_model.train(training)(x), expected)


class AloneInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.out = OtherwiseAlone(), nn.ReLU(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        return self.out(self.act(self.inner(x)))


def test_only_the_module_that_asks_stays_in_python() -> None:
    captured = biofx.capture(AloneInside(), example_inputs=torch.ones(3, 4))
    assert set(captured.graph_breaks) == {"inner"}
    assert set(captured.region_paths) == {"inner.fc", "inner.norm", "inner.out"}


def test_axes_are_resized_wherever_their_size_occurs() -> None:
    given: Any = ((torch.arange(6).reshape(2, 3), torch.zeros(2, 5)), {})
    first = axes_of(given)[0]
    assert first == Axis(True, 2)
    resized = first.resized(given, 3)
    assert resized[0][0].tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert resized[0][1].shape == (3, 5)


def test_an_axis_is_of_samples_where_one_more_changes_nothing_for_the_others() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    again = torch.cat([x, x[:1]])
    axis = Axis(True, 3)
    assert is_of_samples(axis, x * 2, again * 2)
    assert not is_of_samples(axis, x - x.mean(0), again - again.mean(0))
    assert not is_of_samples(axis, x.sum(0), again.sum(0))
