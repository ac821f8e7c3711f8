from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from scipy import stats
from torch import Generator, Tensor

from biofx.operators.sampling import (
    BLOCK,
    LEVELS,
    for_each_block,
    normal_quantiles,
    random_levels,
    sampled_from,
)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def draw(count: int, seed: int = 0) -> Tensor:
    def work(block: slice, own: Generator) -> Tensor:
        return torch.rand(block.stop - block.start, generator=own)

    return torch.cat(for_each_block(count, work, Generator().manual_seed(seed)))


def test_blocks_cover_everything_once_and_in_order() -> None:
    count = 2 * BLOCK + 5
    found = for_each_block(count, lambda block, _: torch.arange(block.start, block.stop))
    assert torch.equal(torch.cat(found), torch.arange(count))
    assert len(found) == 3


def test_what_does_not_matter_is_left_out_and_changes_nothing_else() -> None:
    count, size = 2 * BLOCK + 5, BLOCK

    def work(block: slice, own: Generator) -> tuple[slice, Tensor]:
        return block, torch.rand(block.stop - block.start, generator=own)

    everything = draw(count)
    for within in (slice(0, 1), slice(size - 1, size + 1), slice(2 * size, count), slice(size, size)):
        found = for_each_block(count, work, Generator().manual_seed(0), within=within)
        covered = [place for block, _ in found for place in range(block.start, block.stop)]
        assert set(range(within.start, within.stop)) <= set(covered)
        assert len(covered) < count
        for block, numbers in found:
            assert torch.equal(numbers, everything[block])


def test_numbers_do_not_depend_on_the_number_of_threads(two_threads: None) -> None:
    count = 3 * BLOCK + 1
    with_two = draw(count)
    torch.set_num_threads(1)
    assert torch.equal(with_two, draw(count))


def test_each_block_has_numbers_of_its_own() -> None:
    first, second = draw(2 * BLOCK).chunk(2)
    assert not torch.equal(first, second)
    assert not torch.equal(draw(10), draw(10, seed=1))


def test_the_work_is_not_recorded_for_autograd() -> None:
    weight = torch.ones(2 * BLOCK, requires_grad=True)
    found = for_each_block(len(weight), lambda block, _: weight[block] * 2)
    assert not any(part.requires_grad for part in found)


def noise(count: int, seed: int) -> Tensor:
    return sampled_from(normal_quantiles(), count, torch.Generator().manual_seed(seed))


def test_the_noise_is_standard_normal() -> None:
    drawn = noise(1_000_000, 0).double()
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 0.01
    assert abs(drawn.mean().item()) < 4e-3
    assert abs(drawn.std().item() - 1) < 3e-3
    assert abs(drawn.pow(4).mean().item() - 3) < 0.05


def test_the_noise_depends_on_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = noise(1001, 7), noise(1001, 7), noise(1001, 8)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (1001,)


def test_levels_are_equally_likely() -> None:
    drawn = random_levels(64 * LEVELS, torch.Generator().manual_seed(0)).long()
    counts = torch.bincount(drawn, minlength=LEVELS)
    assert len(counts) == LEVELS
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
