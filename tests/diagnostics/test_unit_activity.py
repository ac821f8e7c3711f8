"""Dormant and dead units and ranks, each against its definition written out here."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from biofx.diagnostics.unit_activity import SeenActivity, UnitActivity, ranks


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(*batches: Tensor, channel_axis: int = -1, most: int = 1000, dormancy: float = 0.1) -> UnitActivity:
    kept = SeenActivity(most)
    for batch in batches:
        kept.add(batch, channel_axis)
    found = kept.measure(dormancy)
    assert found is not None
    return found


def effective_rank(rows: Tensor) -> float:
    """Roy and Vetterli: the exponential of the entropy of the normalised singular values."""
    values = torch.linalg.svdvals(rows.double()).tolist()
    shares = [value / sum(values) for value in values]
    return math.exp(-sum(p * math.log(p) for p in shares if p > 1e-12))


def stable_rank(rows: Tensor) -> float:
    rows = rows.double()
    return float(rows.square().sum() / torch.linalg.matrix_norm(rows, 2) ** 2)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (7, 7), (1, 5), (5, 1)])
def test_ranks_equal_their_definitions(shape: tuple[int, int]) -> None:
    rows = drawn(*shape)
    assert ranks(rows) == pytest.approx((effective_rank(rows), stable_rank(rows)), rel=1e-12)
    single = rows.float()
    assert ranks(single) == pytest.approx((effective_rank(single), stable_rank(single)), rel=1e-6)


def test_ranks_of_matrices_whose_singular_values_are_known() -> None:
    left, _ = torch.linalg.qr(drawn(60, 3))
    right, _ = torch.linalg.qr(drawn(40, 3, seed=1))
    of_three = left @ torch.diag(torch.tensor([4.0, 4.0, 2.0], dtype=torch.float64)) @ right.T
    expected = math.exp(-(2 * 0.4 * math.log(0.4) + 0.2 * math.log(0.2)))
    assert ranks(of_three) == pytest.approx((expected, 36 / 16), rel=1e-12)
    assert ranks(3 * left @ right.T) == pytest.approx((3, 3), rel=1e-12)
    assert ranks(torch.outer(drawn(50), drawn(70))) == pytest.approx((1, 1), rel=1e-12)


def test_ranks_of_complex_activity() -> None:
    rows = torch.complex(drawn(9, 6), drawn(9, 6, seed=1))
    values = torch.linalg.svdvals(rows)
    shares = values / values.sum()
    entropy = -(shares * shares.log()).sum()
    expected = (entropy.exp().item(), (values.square().sum() / values[0] ** 2).item())
    assert ranks(rows) == pytest.approx(expected, rel=1e-12)


def test_ranks_of_nothing() -> None:
    assert ranks(torch.zeros(5, 4)) == (0.0, 0.0)
    assert all(map(math.isnan, ranks(torch.full((5, 4), math.inf))))
    assert all(map(math.isnan, ranks(torch.zeros(0, 4))))


def test_silent_units_are_counted() -> None:
    activity = drawn(200, 10).abs() + 1
    activity[:, 3] = 0  # dead
    activity[:, 5] = 0
    activity[17, 5] = 1e-30  # once active
    activity[:, 7] *= 0.05
    means = [sum(map(abs, column)) / 200 for column in activity.T.tolist()]
    layer = sum(means) / 10
    found = seen(activity)
    assert (found.units, found.samples) == (10, 200)
    assert found.mean_magnitude == pytest.approx(layer, rel=1e-12)
    assert found.dead == sum(mean == 0 for mean in means) == 1
    assert found.dormant == sum(mean / layer <= 0.1 for mean in means) == 3
    assert (found.dead_fraction, found.dormant_fraction) == (0.1, 0.3)
    assert seen(activity, dormancy=0).dormant == 1
    assert seen(-activity).dormant == 3
    assert seen(torch.zeros(4, 6)) == UnitActivity(6, 4, 0.0, 6, 6, 4, 0.0, 0.0)


def test_channels_of_a_convolution_have_a_sample_at_each_position() -> None:
    images = drawn(4, 6, 5, 3)
    images[:, 2] = 0
    rows = torch.stack([image[:, i, j] for image in images for i in range(5) for j in range(3)])
    found = seen(images, channel_axis=-3)
    assert (found.units, found.samples, found.rank_samples, found.dead) == (6, 60, 60, 1)
    assert found.mean_magnitude == pytest.approx(rows.abs().mean().item(), rel=1e-12)
    assert found.effective_rank == pytest.approx(effective_rank(rows), rel=1e-12)
    assert found.stable_rank == pytest.approx(stable_rank(rows), rel=1e-12)


def test_vector_without_a_batch_is_one_sample() -> None:
    found = seen(torch.tensor([3.0, 0.0, 4.0]))
    assert (found.samples, found.dead, found.effective_rank) == (1, 1, 1.0)


def test_forwards_of_a_step_are_one_batch() -> None:
    parts = [drawn(8, 5, seed=seed) for seed in range(3)]
    parts[0][:, 1] = parts[1][:, 1] = 0
    whole = seen(torch.cat(parts))
    several = seen(*parts)
    assert several.dead == 0 == whole.dead
    for name, value in vars(whole).items():
        assert getattr(several, name) == pytest.approx(value, rel=1e-12)


def test_ranks_are_of_the_first_samples_where_there_are_many() -> None:
    parts = [drawn(8, 5, seed=seed) for seed in range(4)]
    found = seen(*parts, most=20)
    assert (found.samples, found.rank_samples) == (32, 20)
    held = SeenActivity(20)
    for part in parts:
        held.add(part, -1)
    rows = torch.cat(held.rows)
    assert torch.equal(rows[:16], torch.cat(parts[:2]))
    places = [int((parts[2] == row).all(1).nonzero()) for row in rows[16:]]
    assert len(set(places)) == 4  # each once, of the third
    assert found.effective_rank == pytest.approx(effective_rank(rows), rel=1e-12)


def test_positions_are_chosen_evenly_and_always_alike() -> None:
    axes = [torch.arange(size, dtype=torch.float64) for size in (16, 32, 32)]
    where = torch.stack(torch.meshgrid(*axes, indexing="ij"), 1)  # each position is its own activity
    random_state = torch.get_rng_state()
    chosen = []
    for _ in range(2):
        held = SeenActivity(256)
        held.add(where, -3)
        chosen.append(torch.cat(held.rows))
    assert torch.equal(*chosen)
    assert torch.equal(torch.get_rng_state(), random_state)
    rows = chosen[0]
    assert rows.shape == (256, 3)
    assert len(rows.unique(dim=0)) == 256
    for column, size in zip(rows.T, (16, 32, 32), strict=True):
        assert len(column.unique()) > 0.9 * size  # a stride of 64 would meet one column of the images
        assert abs(column.mean().item() - (size - 1) / 2) < 0.15 * size


def test_what_is_kept_does_not_follow_later_changes() -> None:
    activity = drawn(6, 4)
    expected = activity.clone()
    held = SeenActivity(10)
    held.add(activity, -1)
    activity.zero_()
    assert torch.equal(torch.cat(held.rows), expected)


def test_half_precision_is_summed_in_single() -> None:
    found = seen(torch.full((3000, 4), 40.0, dtype=torch.float16))
    assert found.mean_magnitude == pytest.approx(40, rel=1e-6)
    assert (found.effective_rank, found.stable_rank) == pytest.approx((1, 1), rel=1e-6)


def test_nothing_seen_is_none() -> None:
    assert SeenActivity(4).measure(0.1) is None
    kept = SeenActivity(4)
    kept.add(torch.zeros(0, 3), -1)
    assert kept.measure(0.1) is None


def test_other_numbers_of_units_are_left_out() -> None:
    kept = SeenActivity(10)
    kept.add(drawn(3, 4), -1)
    kept.add(drawn(3, 5), -1)
    found = kept.measure(0.1)
    assert found is not None
    assert (found.units, found.samples) == (4, 3)
