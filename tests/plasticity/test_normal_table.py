from __future__ import annotations

import torch
from scipy import stats

from biofx.plasticity.normal_table import standard_normal


def test_the_noise_is_standard_normal() -> None:
    drawn = standard_normal(1_000_000, torch.Generator().manual_seed(0)).double()
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 0.01
    assert abs(drawn.mean().item()) < 4e-3
    assert abs(drawn.std().item() - 1) < 3e-3
    assert abs(drawn.pow(4).mean().item() - 3) < 0.05


def test_the_noise_depends_on_the_generator_alone() -> None:
    first, second = (standard_normal(1001, torch.Generator().manual_seed(7)) for _ in range(2))
    state = torch.get_rng_state()
    other = standard_normal(1001, torch.Generator().manual_seed(8))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (1001,)
