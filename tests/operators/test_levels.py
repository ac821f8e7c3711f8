from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

from biofx.operators.levels import LEVELS, drawn_from, normal_quantiles, random_levels


def draw(count: int, seed: int) -> Tensor:
    return drawn_from(normal_quantiles(), count, torch.Generator().manual_seed(seed))


def test_the_noise_is_standard_normal() -> None:
    drawn = draw(1_000_000, 0).double()
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 0.01
    assert abs(drawn.mean().item()) < 4e-3
    assert abs(drawn.std().item() - 1) < 3e-3
    assert abs(drawn.pow(4).mean().item() - 3) < 0.05


def test_the_noise_depends_on_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = draw(1001, 7), draw(1001, 7), draw(1001, 8)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (1001,)


def test_levels_are_equally_likely() -> None:
    drawn = random_levels(64 * LEVELS, torch.Generator().manual_seed(0)).long()
    counts = torch.bincount(drawn, minlength=LEVELS)
    assert len(counts) == LEVELS
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
