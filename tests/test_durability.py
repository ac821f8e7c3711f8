from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from durability import changes, table
from durability.arriving import Arrived, arrived, by_backward
from durability.measures import made, untransformed
from durability.mechanisms import MECHANISMS, Mechanism
from durability.rounded import Rounded

ROOT = Path(__file__).parent.parent


def after(name: str, journey: Callable[[nn.Module], Any]) -> str:
    return table.measure(name, partial(table.after_journey, journey=journey))


def test_what_survives_what(golden: Callable[[str, str], None]) -> None:
    found = table.table()
    columns = len(MECHANISMS)
    cells = {cell for row in found.splitlines()[1:] for cell in row.split()[-columns:]}
    assert cells <= {"kept", "refused", "idle", "unrun"}
    unrun = [row for row in found.splitlines() if "unrun" in row]
    assert [row.split("  ")[0] for row in unrun] == ([] if torch.cuda.is_available() else ["CUDA graph"])
    golden("durability", found)
    assert found in (ROOT / "tools" / "durability" / "README.md").read_text(encoding="utf-8")


def test_a_mechanism_that_is_lost_shows() -> None:
    """The measurement itself: a journey that forgets the mechanism, or changes it, does not pass."""

    def forgets(bio_model: Any) -> Any:
        return arrived(untransformed(bio_model))

    for name in ("split", "sub-weights", "signs", "signs, abs", "signs, expand", "factors", "from seed"):
        assert after(name, forgets) == "LOST"
    assert after("activity", forgets) == "LOST"
    assert after("rules", forgets) == "refused"

    def doubles(bio_model: Any) -> Any:
        return Arrived(lambda x: bio_model(x) * 2, by_backward(bio_model), bio_model)

    assert after("factors", doubles) == "WRONG"
    assert after("factors", lambda model: 1 / 0) == "CRASH"


class Deaf(nn.Module):
    """A model that goes on as it was, whatever is done to its modules."""

    def __init__(self, bio_model: nn.Module) -> None:
        super().__init__()
        self._modules.update(bio_model._modules)
        self.as_it_was = [copy.deepcopy(bio_model)]

    def forward(self, x: Tensor) -> Any:
        return self.as_it_was[0](x)


CHANGED = ("adapter", "quantised", "norm settings changed", "mode by own train()")


@pytest.mark.parametrize("row", CHANGED)
def test_a_change_without_effect_shows(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "made", lambda *given: Deaf(made(*given)))
    assert table.measure("split", changes.CHANGES[row]) == "LOST"


@pytest.mark.parametrize("row", CHANGED[:3])
def test_a_change_to_a_model_that_calls_its_layers_is_as_defined(
    row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = Mechanism({"fuzzy_lr_distribution": "baseline"})
    monkeypatch.setitem(changes.MEANT, "off", off)
    monkeypatch.setitem(MECHANISMS, "off", off)
    assert table.measure("off", changes.CHANGES[row]) == "kept"


def test_the_quantised_weight_is_a_layers_weight_and_nothing_else() -> None:
    weight, x = torch.tensor([[127.0, -64.0]]), torch.tensor([[2.0, 3.0]])
    rounded = nn.Parameter(Rounded.of(weight), requires_grad=False)
    assert isinstance(rounded, Rounded)
    assert torch.equal(nn.functional.linear(x, rounded), x @ weight.T)
    with pytest.raises(NotImplementedError, match="Rounded has no"):
        rounded + 1
