"""Which parts of a model the graph has taken apart; they train in ``tests/test_distributed.py``."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

import biofx
from biofx.plasticity.ranks import parts_not_called, refuse_parts_alone


def shard_by_itself(module: Any) -> None:
    """Make a module look as ``fully_shard`` makes it look."""
    module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {"unshard": lambda self: None})


class Choosing(nn.Module):
    """Stays in Python, and calls its part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) if float(x.sum()) > 0 else x


def test_parts_that_a_graph_has_taken_apart_are_not_called() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)))
    model = nn.Sequential(block, nn.Linear(4, 4), nn.Linear(4, 4), Choosing())
    bio_model: Any = biofx.transform(model, exclude="1").graph_module
    assert "3" in bio_model.graph_breaks
    for path in ("0", "0.1", "1", "2", "3", "3.part", "3.part.0"):
        shard_by_itself(bio_model.get_submodule(path))
    # the graph reads the layers of 0 and 2, and calls 1 and 3; Python calls what is in 3
    assert [path for path, _ in parts_not_called(bio_model)] == ["0", "0.1", "2"]
    with pytest.raises(biofx.errors.PlasticityError, match=r"found only parts of it sharded, as '0'"):
        refuse_parts_alone(bio_model)
    shard_by_itself(bio_model)
    refuse_parts_alone(bio_model)
