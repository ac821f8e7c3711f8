from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from biofx.model.rollback import has_places_for, unchanged_on_failure


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("hidden", torch.ones(1), persistent=False)
        self.notes: dict[str, Any] = {"list": [1, [2]], "set": {3}, "by": defaultdict(int, a=1)}
        self.number = 1


def change(model: Held, optimizer: torch.optim.Optimizer) -> None:
    model.number, model.later = 2, 3  # type: ignore[assignment]
    model.notes["list"][1].append(4)
    model.notes["set"].add(5)
    model.notes["by"]["b"] += 1
    model.notes["new"] = 6
    model.register_buffer("more", torch.ones(1))
    model._buffers["count"] = torch.full((2,), 7.0)
    with torch.no_grad():
        model.fc.weight.mul_(2)
    model.fc.bias.data = torch.zeros(5, dtype=torch.float64)
    model.add_module("extra", nn.Linear(1, 1))
    model.eval()
    optimizer.state.clear()
    optimizer.param_groups[0].update(lr=9.0, momentum=None)
    optimizer.param_groups.append({"params": []})


def failing(change: Callable[[], object], *holders: Any) -> None:
    def changed_and_failed() -> None:
        with unchanged_on_failure(*holders):
            change()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        changed_and_failed()


def test_everything_that_was_there_is_there_again() -> None:
    model = Held()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.fc(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    count, weight, notes = model.count, model.fc.weight, model.notes
    values = {key: value.clone() for key, value in (*model.named_parameters(), *model.named_buffers())}
    moments = [entry["momentum_buffer"].clone() for entry in optimizer.state.values()]
    failing(lambda: change(model, optimizer), model, optimizer)
    assert model.count is count
    assert model.fc.weight is weight
    assert model.notes is notes
    assert notes == {"list": [1, [2]], "set": {3}, "by": {"a": 1}}
    assert (model.number, model.training, model.fc.training) == (1, True, True)
    assert not hasattr(model, "later")
    assert not hasattr(model, "extra")
    found = dict((*model.named_parameters(), *model.named_buffers()))
    assert found.keys() == values.keys()
    assert all(torch.equal(found[key], value) for key, value in values.items())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], len(group["params"])) == (0.1, 0.9, 2)
    for entry, value in zip(optimizer.state.values(), moments, strict=True):
        assert torch.equal(entry["momentum_buffer"], value)


def test_without_a_failure_changes_stay() -> None:
    model = Held()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with unchanged_on_failure(model, optimizer):
        change(model, optimizer)
    assert model.number == 2
    assert optimizer.param_groups[0]["lr"] == 9.0
    assert torch.equal(model.get_buffer("count"), torch.full((2,), 7.0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3, 3).to_sparse(),
        lambda: torch.ones(3, device="meta"),
        lambda: torch.ones(3, dtype=torch.complex64).conj(),
        lambda: torch.ones(0),
    ],
)
def test_tensors_of_every_kind_can_be_kept(make: Any) -> None:
    model = nn.Module()
    model.register_buffer("held", make())
    kept = model.held
    failing(lambda: setattr(model, "held", torch.zeros(1)), model)
    assert model.held is kept


def test_what_loads_without_a_doubt_is_not_kept_twice() -> None:
    model = Held()
    state = model.state_dict()
    assert has_places_for(model, state)
    assert has_places_for(model, OrderedDict({**state, "_extra_state": torch.ones(4)}))
    for wrong in (
        {},
        {**state, "more": torch.ones(1)},
        {**state, "count": torch.ones(3)},
        {**state, "count": 2},
    ):
        assert not has_places_for(model, wrong)
