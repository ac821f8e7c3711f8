"""What a rank does with its part; how ranks agree is in ``tests/test_distributed.py``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from biofx.operators.parts import is_sharded, local, local_part
from biofx.plasticity.shards import flat_span, norm_of_part, sum_over_ranks


def test_a_whole_tensor_is_all_of_itself() -> None:
    weight = torch.randn(5, 3)
    assert not is_sharded(weight)
    assert local(weight) is weight
    factors = torch.randn(5, 1)
    assert local_part(factors, weight) is factors
    assert norm_of_part(weight, weight) == pytest.approx(float(weight.norm()))
    assert flat_span(weight) == slice(0, 15)
    assert sum_over_ranks(torch.tensor(3), weight) == 3


@pytest.mark.parametrize(("rank", "rows"), [(0, slice(0, 3)), (1, slice(3, 5))])
@pytest.mark.parametrize("shape", [(5, 3), (5, 1), (1, 3), (1, 1)])
def test_a_rank_takes_the_rows_that_it_has(
    rank: int, rows: slice, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.distributed.tensor import _utils

    def layout(*_: Any) -> tuple[tuple[int, int], tuple[int, int]]:
        return (rows.stop - rows.start, 3), (rows.start, 0)

    monkeypatch.setattr(_utils, "compute_local_shape_and_global_offset", layout)
    like: Any = torch.randn(5, 3)
    like.device_mesh = like.placements = SimpleNamespace(rank=rank)
    full = torch.randn(shape)
    expected = full.expand(5, 3)[rows]
    found: Tensor = local_part(full, like)
    assert torch.equal(found.expand(expected.shape), expected)
    assert found.untyped_storage().data_ptr() == full.untyped_storage().data_ptr()
    assert flat_span(like) == slice(3 * rows.start, 3 * rows.stop)
    units = torch.randn(5)
    assert local_part(units, like) is units
