"""Classes whose train() and eval() do more than set the flag are right in both modes, from either."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.capture.capture import capture
from biofx.errors import CaptureError
from biofx.model.modes import switches_of

OFF = {"fuzzy_lr_distribution": "baseline"}


class Body(nn.Module):
    """Has one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


class Merges(Body):
    """Adds one weight to another for evaluation, as adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.merged = nn.Linear(4, 4, bias=False), False

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        with torch.no_grad():
            if mode and self.merged:
                self.layer.weight.sub_(self.extra.weight)
            elif not mode and not self.merged:
                self.layer.weight.add_(self.extra.weight)
        self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) if self.merged else self.layer(x) + self.extra(x)


class Noisy(Body):
    noise = 0.5

    def train(self, mode: bool = True, *, noise: float = 0.5) -> Any:
        self.noise = noise if mode else 0.0
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) + self.noise


class Terse(Body):
    def train(self) -> Any:  # type: ignore[override]
        self.training = True
        return self

    def eval(self) -> Any:
        self.training = False
        return self

    def forward(self, x: Tensor) -> Any:
        return torch.relu(self.layer(x)) if self.training else self.layer(x)


class SetsAText(Body):
    mode = "train"

    def train(self, mode: bool = True) -> Any:
        self.mode = "train" if mode else "eval"
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) if self.mode == "train" else -self.layer(x)


class SetsATextAlone(SetsAText):
    """Has no flag to go by."""

    def train(self, mode: bool = True) -> Any:
        self.mode = "train" if mode else "eval"
        return self


class SetsAChild(nn.Module):
    class Child(Body):
        def __init__(self) -> None:
            super().__init__()
            self.is_on, self.factor = True, 3

        def forward(self, x: Tensor) -> Any:
            return self.layer(x) * self.factor if self.is_on else self.layer(x)

    def __init__(self) -> None:
        super().__init__()
        self.child = self.Child()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.child.is_on, self.child.factor = mode, 3 if mode else 5
        return self

    def forward(self, x: Tensor) -> Any:
        return self.child(x)


class SetsAFunction(Body):
    def __init__(self) -> None:
        super().__init__()
        self.function: Any = torch.relu

    def train(self, mode: bool = True) -> Any:
        self.function = torch.relu if mode else torch.tanh
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x))


class SetsAMethod(Body):
    def __init__(self) -> None:
        super().__init__()
        self.way: Any = self.there

    def there(self, x: Tensor) -> Any:
        return self.layer(x)

    def back(self, x: Tensor) -> Any:
        return -self.layer(x)

    def train(self, mode: bool = True) -> Any:
        self.way = self.there if mode else self.back
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        return self.way(x)


class SetsAList(Body):
    def __init__(self) -> None:
        super().__init__()
        self.factors = [1.0, 2.0]

    def train(self, mode: bool = True) -> Any:
        self.factors = [1.0, 2.0] if mode else [3.0]
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        for factor in self.factors:
            x = self.layer(x) * factor
        return x


class SetsATable(Body):
    def __init__(self) -> None:
        super().__init__()
        self.table = {"is_on": True}

    def train(self, mode: bool = True) -> Any:
        self.table["is_on"] = mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) if self.table["is_on"] else -self.layer(x)


class SetsATensor(Body):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(1))
        self.shift = torch.ones(1)

    def train(self, mode: bool = True) -> Any:
        self.factor = torch.tensor([1.0 if mode else 3.0])
        self.shift = torch.tensor([1.0 if mode else 2.0])
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * self.factor + self.shift


class Counts(Body):
    number = 0

    def train(self, mode: bool = True) -> Any:
        self.number += 1
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) * self.number


class Reparametrised(Body):
    """Puts one layer in the place of two."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 4)
        self.both: nn.Linear | None = None

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.both = None
        if not mode:
            self.both = nn.Linear(4, 4)
            with torch.no_grad():
                self.both.weight.copy_(self.layer.weight + self.other.weight)
                self.both.bias.copy_(self.layer.bias + self.other.bias)
        return self

    def forward(self, x: Tensor) -> Any:
        return self.layer(x) + self.other(x) if self.both is None else self.both(x)


class KeepsAPartInEvaluation(nn.Module):
    class Part(Body):
        def forward(self, x: Tensor) -> Any:
            return -self.layer(x) if self.training else self.layer(x)

    def __init__(self) -> None:
        super().__init__()
        self.part, self.norm, self.head = self.Part(), nn.BatchNorm1d(4), self.Part()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.part.eval()
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.part(x))
        return self.head(x) if self.norm.training else self.head(x) + 1


class FreezesParameters(Body):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.layer.requires_grad_(not mode)
        return self

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


ONE_GRAPH = (Merges, Noisy, SetsAText, SetsAChild, SetsAFunction, FreezesParameters, SetsATensor)
IN_PYTHON = (SetsATextAlone, SetsAMethod, SetsAList, SetsATable, Counts, Reparametrised)
ALL = (*ONE_GRAPH, *IN_PYTHON, KeepsAPartInEvaluation, Terse)


def _transformed(model: nn.Module, recorded: bool) -> Any:
    example: Any = ((torch.randn(3, 4),), {}) if recorded else None
    return biofx.transform(model, OFF, example_inputs=example).graph_module


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("captured_in", ["train", "eval"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ALL)
def test_both_modes_are_right_from_either(
    kind: type[nn.Module], wrapped: bool, captured_in: str, recorded: bool
) -> None:
    if wrapped and kind is Terse:
        kind = Noisy  # torch's own Sequential hands a mode to train()
    model: nn.Module = nn.Sequential(kind(), nn.ReLU()) if wrapped else kind()
    getattr(model, captured_in)()
    before = copy.deepcopy(model.state_dict())
    made = _transformed(model, recorded)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    x = torch.randn(3, 4)
    for each in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        original = copy.deepcopy(model)
        assert torch.equal(each(x), original(x))
        for mode in ("eval", "train", "train", "eval", "eval", "train"):
            for switched in (original, each):
                getattr(switched, mode)()
            assert torch.equal(each(x), original(x))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", ONE_GRAPH)
def test_what_the_mode_decides_stays_one_graph(kind: type[nn.Module], recorded: bool) -> None:
    assert not _transformed(kind(), recorded).graph_breaks


@pytest.mark.parametrize("kind", IN_PYTHON)
def test_what_no_graph_could_tell_stays_in_python(kind: type[nn.Module]) -> None:
    assert "" in _transformed(kind(), recorded=False).graph_breaks
    with pytest.raises(CaptureError, match=r"train\(\)"):
        capture(kind(), regions=False)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_flag_changed_without_its_mode_is_an_error(recorded: bool) -> None:
    made = _transformed(nn.Sequential(Merges()).eval(), recorded)
    x = torch.randn(3, 4)
    made(x)
    made[0].merged = False
    with pytest.raises(
        CaptureError, match=r"'merged' of module '0' .* expected True, .* in evaluation, found False"
    ):
        made(x)


def test_a_flag_that_no_mode_changes_is_not_changed_by_hand() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.BatchNorm1d(4), nn.Linear(4, 4)

        def train(self, mode: bool = True) -> Any:
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x: Tensor) -> Any:
            return nn.functional.dropout(self.layer(x), 0.5, self.norm.training)

    x = torch.randn(3, 4)
    for recorded in (False, True):
        model = Reads()  # in training, its norm too
        made = _transformed(model, recorded)
        for each in (model.train(), made.train()):
            assert not each.norm.training
        assert torch.equal(made(x), model(x))
        made.norm.train()
        if recorded:
            with pytest.raises(CaptureError, match="'training' of module 'norm'"):
                made(x)
        else:
            model.norm.train()
            torch.manual_seed(1)
            expected = model(x)
            torch.manual_seed(1)
            assert torch.equal(made(x), expected)


def test_only_what_changes_is_looked_at() -> None:
    assert not switches_of(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))).are_some
    found = switches_of(nn.Sequential(Merges(), SetsAList(), Reparametrised(), SetsATextAlone()))
    assert found.values == {("0", "merged"): (False, True)}
    assert found.unclear >= {("1", "factors"), ("3", "mode"), ("2", "both")}
    assert found.rebuilt == {"2"}
    assert found.stuck["3"] is True
