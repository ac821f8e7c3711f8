"""Turnover of units, by its definition written out by hand, and what it must leave alone."""

from __future__ import annotations

import copy
import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, Rule
from biofx.errors import NonFiniteWeightError, PlasticityError
from biofx.operators.sampling import generator_for
from biofx.plasticity.model_states import bio_modules
from tests.two_ranks import run_on_two_ranks

EXACT: Any = {"rtol": 0.0, "atol": 1e-12}
ALWAYS = [Rule("rejuvenate_units")]


def config(**fields: Any) -> BioConfig:
    given: dict[str, Any] = {
        "fuzzy_lr_distribution": "baseline",
        "unit_turnover": "continual-backprop",
        "unit_turnover_rate": 0.25,
        "unit_turnover_maturity": 2,
        "seed": 7,
    }
    return BioConfig(**{**given, **fields})


def watched(model: nn.Module, **fields: Any) -> Any:
    return biofx.transform(model, config=config(**fields)).graph_module


def train(bio: Any, x: Tensor, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        bio(x).square().mean().backward()
        optimizer.step()


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def test_the_definition_by_hand() -> None:
    """Utility, ages, which units go, weights, biases and Adam's moments, over 12 steps."""
    model = mlp()
    bio = watched(model)
    optimizer = torch.optim.Adam(bio.parameters(), 0.01)
    biofx.attach(bio, optimizer, ALWAYS)
    plain = copy.deepcopy(model)
    w1, b1, w2, b2 = plain.parameters()
    own = torch.optim.Adam([w1, b1, w2, b2], 0.01)
    bound = 1 / math.sqrt(5)
    utility, age, mean = torch.zeros(8).double(), torch.zeros(8), torch.zeros(8).double()
    due, replaced, events = 0.0, [], 0
    x = torch.randn(12, 6, 5, dtype=torch.float64)
    for step in range(12):
        for net, stepped in ((bio, optimizer), (plain, own)):
            stepped.zero_grad()
            (net(x[step]) - 1).square().mean().backward()
        with torch.no_grad():
            hidden = torch.tanh(x[step] @ w1.T + b1)
        optimizer.step()
        own.step()
        with torch.no_grad():
            age += 1
            utility = 0.99 * utility + 0.01 * hidden.abs().mean(0) * w2.abs().sum(0)
            mean = 0.99 * mean + 0.01 * hidden.mean(0)
            eligible = [unit for unit in range(8) if age[unit] > 2]
            due += 0.25 * len(eligible)
            count = int(due)
            due -= count
            order = sorted(eligible, key=lambda unit: float(utility[unit] / (1 - 0.99 ** age[unit])))
            gone = sorted(order[:count])
            replaced.append(gone)
            if gone:
                generator = generator_for(7, "0.weight", events, purpose="rejuvenate_units")
                events += 1
                weights = torch.rand(len(gone), 5, generator=generator, dtype=torch.float64)
                biases = torch.rand(len(gone), generator=generator, dtype=torch.float64)
                for place, unit in enumerate(gone):
                    b2.add_(w2[:, unit] * mean[unit] / (1 - 0.99 ** age[unit].double()))
                    w1[unit] = (2 * weights[place] - 1) * bound
                    b1[unit] = (2 * biases[place] - 1) * bound
                    w2[:, unit] = 0
                    for name in ("exp_avg", "exp_avg_sq"):
                        own.state[w1][name][unit] = 0
                        own.state[b1][name][unit] = 0
                        own.state[w2][name][:, unit] = 0
                    utility[unit] = age[unit] = mean[unit] = 0
        state = bio_modules(bio)["0.weight"]
        assert state.unit_age is not None
        assert state.unit_utility is not None
        assert state.unit_age.tolist() == age.tolist()
        torch.testing.assert_close(state.unit_utility, utility, **EXACT)
        for mine, other in zip(bio.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.detach(), other.detach(), **EXACT)
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(optimizer.state[mine][name], own.state[other][name], **EXACT)
    assert sum(map(len, replaced)) >= 6


def test_the_function_changes_only_by_what_a_unit_did_besides_its_mean() -> None:
    """With one input, a unit is constant and can go unnoticed."""
    bio = watched(mlp(), unit_turnover_maturity=0, unit_turnover_rate=0.5)
    x = torch.randn(1, 5, dtype=torch.float64)
    before = bio(x)
    assert bio_modules(bio)["0.weight"].rejuvenate_units() == 4
    torch.testing.assert_close(bio(x), before, **EXACT)
    assert int((bio.get_parameter("2.weight") == 0).all(0).sum()) == 4


def test_dormant_units_go_and_no_others() -> None:
    model = mlp()
    model[1] = nn.ReLU()
    with torch.no_grad():
        model.get_parameter("0.bias")[[1, 6]] = -1000.0
    bio = watched(model, unit_turnover="redo", unit_turnover_dormancy=0.01)
    bio(torch.randn(64, 5, dtype=torch.float64))
    before = bio.get_parameter("0.weight").detach().clone()
    assert bio_modules(bio)["0.weight"].rejuvenate_units() == 2
    changed = (bio.get_parameter("0.weight") != before).all(1)
    assert changed.nonzero().flatten().tolist() == [1, 6]
    assert bool((bio.get_parameter("2.weight")[:, [1, 6]] == 0).all())
    assert float(bio.get_parameter("0.bias")[1].detach()) > -1000


def test_a_run_without_a_forward_changes_nothing() -> None:
    bio = watched(mlp(), unit_turnover_maturity=0)
    state = bio_modules(bio)["0.weight"]
    assert state.rejuvenate_units() == 0
    assert state.unit_age is not None
    assert not state.unit_age.any()
    bio.eval()
    bio(torch.randn(2, 5).double())
    assert state.rejuvenate_units() == 0


@pytest.mark.parametrize("preset", ["continual-backprop", "redo"])
def test_a_run_after_nothing_but_an_empty_batch_changes_nothing(preset: str) -> None:
    bio = watched(mlp(), unit_turnover=preset, unit_turnover_dormancy=0.0, unit_turnover_maturity=9)
    optimizer = torch.optim.SGD(bio.parameters(), 0.0)
    biofx.attach(bio, optimizer, ALWAYS)
    state: Any = bio_modules(bio)["0.weight"]
    train(bio, torch.ones(2, 5).double(), optimizer, 2)
    age, utility = state.unit_age.clone(), state.unit_utility.clone()
    optimizer.zero_grad()
    bio(torch.ones(0, 5).double()).sum().backward()
    optimizer.step()
    assert torch.equal(state.unit_age, age)
    assert torch.equal(state.unit_utility, utility)
    train(bio, torch.ones(2, 5).double(), optimizer, 1)
    assert torch.equal(state.unit_age, age + 1)


def test_forwards_before_one_run_count_alike() -> None:
    bio = watched(mlp())
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    for batch in x:
        bio(batch)
    bio_modules(bio)["0.weight"].rejuvenate_units()
    hidden = torch.tanh(bio.get_submodule("0")(x)).detach()
    utility = bio_modules(bio)["0.weight"].unit_utility
    expected = 0.01 * hidden.abs().mean((0, 1)) * bio.get_parameter("2.weight").detach().abs().sum(0)
    torch.testing.assert_close(utility, expected, **EXACT)


def conv() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4, 3)
    ).double()


def test_a_unit_behind_flatten_has_a_run_of_columns_and_its_norm_starts_again() -> None:
    model = conv()
    bio = watched(model, unit_turnover_maturity=0, unit_turnover_rate=0.25)
    optimizer = torch.optim.SGD(bio.parameters(), 0.1, momentum=0.9)
    x = torch.randn(8, 2, 4, 4, dtype=torch.float64)
    train(bio, x, optimizer, 3)
    state = bio_modules(bio)["0.weight"]
    norm: Any = bio.get_submodule("1")
    read = bio.get_parameter("4.weight").detach().clone()
    seen = bio_modules(bio)["4.weight"].input_activity
    assert seen is not None
    assert float(seen[0, 0]) == 3
    means = seen[1:3] / seen[0]
    utility = (means[0] * read.abs().sum(0)).reshape(4, 4).sum(1)
    expected = int(utility.argmin())
    shift = read[:, 4 * expected : 4 * expected + 4] @ means[1, 4 * expected : 4 * expected + 4]
    bias = bio.get_parameter("4.bias").detach().clone()
    before = {name: value.clone() for name, value in bio.state_dict().items()}
    assert state.rejuvenate_units(optimizer) == 1
    zero = (bio.get_parameter("4.weight") == 0).all(0)
    assert zero.nonzero().flatten().tolist() == list(range(4 * expected, 4 * expected + 4))
    torch.testing.assert_close(bio.get_parameter("4.bias").detach(), bias + shift, **EXACT)
    others = [unit for unit in range(4) if unit != expected]
    for held, start in (
        (norm.weight, 1.0),
        (norm.bias, 0.0),
        (norm.running_mean, 0.0),
        (norm.running_var, 1.0),
    ):
        assert held[expected].tolist() == start
    for name in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        assert torch.equal(bio.state_dict()[name][others], before[name][others])
    for parameter, index in (
        (bio.get_parameter("0.weight"), expected),
        (norm.weight, expected),
        (norm.bias, expected),
    ):
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert not momentum[index].any()
        assert momentum[others].any()
    momentum = optimizer.state[bio.get_parameter("4.weight")]["momentum_buffer"]
    assert torch.equal((momentum == 0).all(0), zero)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.back(self.inner(x).relu())
        return self.head(x)  # type: ignore[no-any-return]


def test_all_writers_of_a_residual_sum_are_drawn_and_all_readers_are_cut() -> None:
    torch.manual_seed(3)
    bio = watched(Residual().double(), unit_turnover_maturity=0, unit_turnover_rate=1 / 6)
    optimizer = torch.optim.SGD(bio.parameters(), 0.1)
    train(bio, torch.randn(9, 5, dtype=torch.float64), optimizer, 2)
    before = {name: value.clone() for name, value in bio.state_dict().items()}
    states = bio_modules(bio)
    assert states["back.weight"].why_not("rejuvenate_units") == "its units go with those of 'stem'"
    with pytest.raises(PlasticityError, match="go with those of 'stem'"):
        states["back.weight"].rejuvenate_units()
    assert states["stem.weight"].rejuvenate_units(optimizer) == 1
    (unit,) = (bio.get_parameter("head.weight") == 0).all(0).nonzero().flatten().tolist()
    assert bool((bio.get_parameter("inner.weight")[:, unit] == 0).all())
    others = [other for other in range(6) if other != unit]
    for name in ("stem.weight", "stem.bias", "back.weight", "back.bias"):
        after = bio.state_dict()[name]
        assert bool((after[unit] != before[name][unit]).all())
        assert torch.equal(after[others], before[name][others])
    for name in ("head.weight", "inner.weight"):
        assert torch.equal(bio.state_dict()[name][:, others], before[name][:, others])


class Joined(nn.Module):
    """Two grouped convolutions, concatenated, read by a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv1d(2, 2, 1), nn.Conv1d(2, 4, 1, groups=2)
        self.last, self.head = nn.Conv1d(6, 4, 1, groups=2), nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1).relu()
        return self.head(self.last(x).relu()).flatten(1)  # type: ignore[no-any-return]


def test_groups_of_a_convolution_and_places_in_a_concatenation() -> None:
    torch.manual_seed(4)
    bio = watched(Joined().double(), unit_turnover_maturity=0, unit_turnover_rate=0.25)
    with torch.no_grad():
        bio.get_parameter("last.weight")[2:, 1] = 1e-9  # the second input of the second group: channel 4
        bio.get_parameter("last.weight")[:2, 0] = 1e-9  # and channel 0, which the other layer makes
    before = {name: value.clone() for name, value in bio.state_dict().items()}
    bio(torch.randn(5, 2, 3, dtype=torch.float64))
    assert bio_modules(bio)["right.weight"].rejuvenate_units() == 1
    weight = bio.get_parameter("last.weight").detach()
    assert bool((weight[2:, 1] == 0).all())
    assert weight.count_nonzero() == weight.numel() - 2
    changed = (bio.get_parameter("right.weight") != before["right.weight"]).flatten(1).any(1)
    assert changed.nonzero().flatten().tolist() == [2]
    assert torch.equal(bio.get_parameter("left.weight"), before["left.weight"])
    assert bio_modules(bio)["left.weight"].unit_age.tolist() == [0, 0]  # type: ignore[union-attr]


def test_signs_and_masks_are_kept() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    bio = watched(
        model,
        apply_dales_principle=True,
        weight_density=0.5,
        unit_turnover_rate=0.5,
        unit_turnover_maturity=0,
    )
    state, mask = bio_modules(bio)["2.weight"], bio_modules(bio)["2.weight"].connection_mask
    signs = state.presynaptic_signs()
    weight = bio.get_parameter("2.weight")
    before = weight.detach().clone()
    bio(torch.randn(16, 5))
    assert mask is not None
    assert state.rejuvenate_units() == 4
    drawn = (weight != before).any(1)
    assert int(drawn.sum()) == 4
    assert torch.equal(weight.detach()[drawn] != 0, mask[drawn] > 0.5)
    assert bool((weight.detach() * signs >= 0).all())


def test_units_with_a_rate_of_zero_stay_and_so_do_frozen_ones() -> None:
    bio = watched(mlp(), fuzzy_lr_distribution="uniform", unit_turnover_maturity=0, unit_turnover_rate=1.0)
    states = bio_modules(bio)
    for path, place in (("0.weight", (3, 2)), ("2.weight", (1, 5))):
        factors = states[path].fuzzy_learning_rate_parameters
        assert factors is not None
        factors[place] = 0.0
    optimizer = torch.optim.Adam(bio.parameters(), 0.01)
    biofx.attach(bio, optimizer, ALWAYS)
    start = {name: value.clone() for name, value in bio.state_dict().items()}
    train(bio, torch.randn(6, 5, dtype=torch.float64), optimizer, 3)
    assert torch.equal(bio.get_parameter("0.weight")[3, 2], start["0.weight"][3, 2])
    assert torch.equal(bio.get_parameter("2.weight")[1, 5], start["2.weight"][1, 5])
    zero = (bio.get_parameter("2.weight") == 0).all(0)
    assert (~zero).nonzero().flatten().tolist() == [3, 5]
    bio.get_parameter("2.weight").requires_grad_(False)
    assert states["0.weight"].why_not("rejuvenate_units") == "'2.weight', which takes part, is frozen"
    frozen = {name: value.clone() for name, value in bio.state_dict().items()}
    train(bio, torch.randn(6, 5, dtype=torch.float64), optimizer, 3)
    assert torch.equal(bio.get_parameter("2.weight"), frozen["2.weight"])
    assert states["0.weight"].unit_age.tolist() == frozen["0.bio_mod.unit_age"].tolist()  # type: ignore[union-attr]


def test_a_resumed_run_goes_on_to_the_bit() -> None:
    x = torch.randn(6, 5, dtype=torch.float64)

    def begin() -> tuple[Any, Any, Any]:
        bio = watched(mlp(), unit_turnover_rate=0.13)
        optimizer = torch.optim.Adam(bio.parameters(), 0.01)
        return bio, optimizer, biofx.attach(bio, optimizer, ALWAYS)

    bio, optimizer, attachment = begin()
    train(bio, x, optimizer, 7)
    file = io.BytesIO()
    torch.save([bio.state_dict(), optimizer.state_dict(), attachment.state_dict()], file)
    train(bio, x, optimizer, 9)
    file.seek(0)
    saved = torch.load(file)
    again, other, resumed = begin()
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    train(again, x, other, 9)
    other_state = again.state_dict()
    assert all(torch.equal(value, other_state[name]) for name, value in bio.state_dict().items())
    assert not torch.equal(bio.get_parameter("2.weight"), saved[0]["2.weight"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: torch.load(_saved(pair), weights_only=False)])
def test_copies_replace_their_own_units(copied: Callable[[Any], Any]) -> None:
    x = torch.randn(6, 5, dtype=torch.float64)
    bio = watched(mlp())
    optimizer = torch.optim.Adam(bio.parameters(), 0.01)
    biofx.attach(bio, optimizer, ALWAYS)
    train(bio, x, optimizer, 5)
    twin, its = copied((bio, optimizer))
    before = {name: value.clone() for name, value in bio.state_dict().items()}
    train(twin, x, its, 5)
    assert all(torch.equal(value, before[name]) for name, value in bio.state_dict().items())
    train(bio, x, optimizer, 5)
    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in bio.state_dict().items())


def _saved(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_seeds_differ_and_the_global_generator_is_left_alone() -> None:
    def after(seed: int) -> Tensor:
        bio = watched(mlp(), seed=seed, unit_turnover_maturity=0)
        bio(torch.ones(2, 5, dtype=torch.float64))
        bio_modules(bio)["0.weight"].rejuvenate_units()
        weight: Tensor = bio.get_parameter("0.weight").detach()
        return weight

    first = after(1)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    bio = watched(mlp(), seed=1, unit_turnover_maturity=0)
    torch.set_rng_state(state)
    bio(torch.ones(2, 5, dtype=torch.float64))
    bio_modules(bio)["0.weight"].rejuvenate_units()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(bio.get_parameter("0.weight"), first)
    assert not torch.equal(after(2), first)


def test_what_is_not_a_number_is_refused_and_nothing_is_changed() -> None:
    bio = watched(mlp(), unit_turnover_maturity=0)
    with torch.no_grad():
        bio.get_parameter("2.weight")[0, 0] = math.nan
    bio(torch.ones(2, 5, dtype=torch.float64))
    before = bio.get_parameter("0.weight").detach().clone()
    with pytest.raises(NonFiniteWeightError, match=r"2\.weight"):
        bio_modules(bio)["0.weight"].rejuvenate_units()
    assert torch.equal(bio.get_parameter("0.weight"), before)


def test_an_optimizer_of_some_of_the_parameters_is_refused() -> None:
    bio = watched(mlp(), unit_turnover_maturity=0, unit_turnover_rate=1.0)
    optimizer = torch.optim.SGD([bio.get_parameter("0.weight")], 0.1)
    bio(torch.ones(2, 5, dtype=torch.float64))
    with pytest.raises(PlasticityError, match=r"one optimizer .*does not hold '0\.bias'"):
        bio_modules(bio)["0.weight"].rejuvenate_units(optimizer)


def test_an_optimizer_of_some_of_the_parameters_is_refused_at_every_run_before_units_are_mature() -> None:
    bio = watched(mlp(), unit_turnover_maturity=1000)
    state: Any = bio_modules(bio)["0.weight"]
    partly = torch.optim.SGD(bio.get_submodule("0").parameters(), 0.1)
    biofx.attach(bio, partly, ALWAYS)
    for _ in range(2):
        with pytest.raises(PlasticityError, match=r"one optimizer .*does not hold '2\.weight'"):
            train(bio, torch.ones(2, 5).double(), partly, 1)
        assert not state.unit_age.any()
        assert not state.unit_utility.any()


def test_a_schedule_without_watched_units_is_refused() -> None:
    bio = biofx.transform(
        mlp(), config=config(unit_turnover="off", fuzzy_lr_distribution="uniform")
    ).graph_module
    with pytest.raises(PlasticityError, match="its units are not watched"):
        biofx.attach(bio, torch.optim.SGD(bio.parameters(), 0.1), ALWAYS)


def test_ages_survive_half_precision() -> None:
    bio = watched(mlp()).to(torch.bfloat16)
    state = bio_modules(bio)["0.weight"]
    assert state.unit_age is not None
    assert state.unit_age.dtype is torch.int64
    assert state.unit_utility is not None
    assert state.unit_utility.dtype is torch.float32
    bio(torch.ones(2, 5, dtype=torch.bfloat16))
    state.rejuvenate_units()
    assert state.unit_age.tolist() == [1] * 8


def test_units_of_pairs_stay_and_say_so() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    bio = watched(model, apply_dales_principle=True, dales_method="expand")
    reasons = {path: state.why_never("rejuvenate_units") for path, state in bio_modules(bio).items()}
    assert "pairs" in str(reasons["0.weight"])


def test_biases_start_at_zero_unless_torch_draws_them() -> None:
    bio = watched(mlp(), unit_turnover_maturity=0, unit_turnover_rate=1.0, initial_distribution="normal")
    bio(torch.ones(2, 5, dtype=torch.float64))
    assert bio_modules(bio)["0.weight"].rejuvenate_units() == 8
    assert not bio.get_parameter("0.bias").any()
    generator = generator_for(7, "0.weight", 0, purpose="rejuvenate_units")
    expected = torch.empty(40, dtype=torch.float64).normal_(0, 1 / math.sqrt(5), generator=generator)
    torch.testing.assert_close(bio.get_parameter("0.weight").detach().flatten(), expected, **EXACT)


_RANKS = """
import itertools
import os
import sys
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import biofx

config = biofx.BioConfig(fuzzy_lr_distribution="baseline", unit_turnover="continual-backprop",
                         unit_turnover_rate=0.25, unit_turnover_maturity=2)
x = torch.randn(8, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def train(rank, way, every):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()
    bio = biofx.transform(model, config=config).graph_module
    optimizer = torch.optim.Adam(bio.parameters(), 0.01)
    if rank is not None:
        try:
            biofx.attach(bio, optimizer, ["rejuvenate_units"])
            raise SystemExit("a bare model was accepted")
        except biofx.errors.PlasticityError as error:
            assert "units are turned over by their activity" in str(error), error
    if way == "sharded":
        fully_shard(bio)
        optimizer = torch.optim.Adam(bio.parameters(), 0.01)
    whole = DistributedDataParallel(bio) if way == "replicated" else bio
    biofx.attach(whole, optimizer, [biofx.Rule("rejuvenate_units", every=every)])
    for batch in x:
        optimizer.zero_grad()
        mine = batch if rank is None else batch[3 * rank : 3 * rank + 3]
        (whole(mine) - 1).square().mean().backward()
        optimizer.step()
    return {name: getattr(value, "full_tensor", lambda: value)() for name, value in bio.state_dict().items()}


rank = int(os.environ["RANK"])
distributed.init_process_group("gloo")
found = {}
for way, every in itertools.product(("replicated", "sharded"), (1, 3)):
    found[f"{way} {every}"] = train(rank, way, every)
distributed.destroy_process_group()
for every in (1, 3) if rank == 0 else ():
    found[f"one {every}"] = train(None, "alone", every)
torch.save(found, f"{sys.argv[1]}{rank}")
"""


def test_two_ranks_replace_the_units_that_one_process_does(tmp_path: Path) -> None:
    """Each rank sees half of a batch, and both replace what one process that sees all of it does."""
    script = tmp_path / "ranks.py"
    script.write_text(_RANKS)
    said = run_on_two_ranks(script, f"{tmp_path}/")
    assert "Error" not in said, said
    first, second = (torch.load(tmp_path / name) for name in ("0", "1"))
    for way, every in itertools.product(("replicated", "sharded"), (1, 3)):
        one = first[f"one {every}"]
        assert every == 3 or (one["0.bio_mod.unit_age"] != one["0.bio_mod.unit_age"][0]).any()
        for name, value in one.items():
            torch.testing.assert_close(first[f"{way} {every}"][name], value, **EXACT)
            assert torch.equal(first[f"{way} {every}"][name], second[f"{way} {every}"][name])


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn: Any = getattr(nn, kind)(3, 4, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_a_recurrent_unit_has_a_row_in_each_gate_and_a_column_of_its_own(kind: str, gates: int) -> None:
    """Rows of both matrices are drawn, with their biases; the column becomes 0 in those rows, too."""
    torch.manual_seed(8)
    bio = watched(Recurrent(kind).double(), unit_turnover_maturity=0, unit_turnover_rate=0.25)
    optimizer = torch.optim.Adam(bio.parameters(), 0.01)
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    train(bio, x, optimizer, 1)
    states = bio_modules(bio)
    hidden = bio.get_submodule("rnn")(x)[0].detach()
    for state in (states["rnn.weight_hh_l0"], states["out.weight"]):
        state.input_activity.zero_()  # type: ignore[union-attr]
    bio(x)
    before = {name: value.clone() for name, value in bio.state_dict().items()}
    recurrent, readout = before["rnn.weight_hh_l0"], before["out.weight"]
    utility = hidden.abs().mean((0, 1)) * (recurrent.abs().sum(0) + readout.abs().sum(0))
    unit = int(utility.argmin())
    assert states["rnn.weight_hh_l0"].rejuvenate_units(optimizer) == 1
    after = bio.state_dict()
    rows = [4 * gate + unit for gate in range(gates)]
    others = [row for row in range(4 * gates) if row not in rows]
    for name in ("rnn.weight_ih_l0", "rnn.bias_ih_l0", "rnn.bias_hh_l0"):
        assert bool((after[name][rows] != before[name][rows]).all())
    assert torch.equal(after["rnn.weight_ih_l0"][others], before["rnn.weight_ih_l0"][others])
    kept = [column for column in range(4) if column != unit]
    assert not after["rnn.weight_hh_l0"][:, unit].any()
    assert not after["out.weight"][:, unit].any()
    assert bool((after["rnn.weight_hh_l0"][rows][:, kept] != recurrent[rows][:, kept]).all())
    assert torch.equal(after["rnn.weight_hh_l0"][others][:, kept], recurrent[others][:, kept])
    mean = hidden.mean((0, 1))[unit]  # of the first run: 0.01 m / (1 - 0.99)
    torch.testing.assert_close(after["out.bias"], before["out.bias"] + readout[:, unit] * mean, **EXACT)
    expected = before["rnn.bias_hh_l0"][others] + recurrent[others, unit] * mean
    torch.testing.assert_close(after["rnn.bias_hh_l0"][others], expected, **EXACT)
    moment = optimizer.state[bio.get_parameter("rnn.weight_hh_l0")]["exp_avg_sq"]
    assert not moment[rows].any()
    assert not moment[:, unit].any()
    assert bool(moment[others][:, kept].all())
    age = states["rnn.weight_hh_l0"].unit_age
    assert age is not None
    assert age.tolist() == [int(other != unit) for other in range(4)]


class Gated(nn.Module):
    """The hidden layer of many transformers: a gate and what it lets through make each unit together."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


def test_both_factors_of_a_gated_unit_are_drawn() -> None:
    torch.manual_seed(9)
    bio = watched(Gated().double(), unit_turnover_maturity=0, unit_turnover_rate=1 / 6)
    before = {name: value.clone() for name, value in bio.state_dict().items()}
    bio(torch.randn(7, 5, dtype=torch.float64))
    assert bio_modules(bio)["gate.weight"].rejuvenate_units() == 1
    (unit,) = (bio.get_parameter("down.weight") == 0).all(0).nonzero().flatten().tolist()
    for name in ("gate.weight", "up.weight", "gate.bias", "up.bias"):
        changed = (bio.state_dict()[name] != before[name]).reshape(6, -1).all(1)
        assert changed.nonzero().flatten().tolist() == [unit]


class Product(nn.Module):
    """As GPT-2 has it: weights are ``(in, out)``, and the activation is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Transposed(5, 6), Transposed(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = 0.5 * h * (1.0 + torch.tanh(0.8 * (h + 0.04 * torch.pow(h, 3.0))))
        return self.second(h)  # type: ignore[no-any-return]


class Transposed(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.ones(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_weights_that_begin_with_their_inputs() -> None:
    torch.manual_seed(10)
    options = {"initial_distribution": "normal", "unit_turnover_maturity": 0, "unit_turnover_rate": 1 / 6}
    bio = watched(Product().double(), **options)
    before = {name: value.clone() for name, value in bio.state_dict().items()}
    x = torch.randn(1, 5, dtype=torch.float64)
    expected = bio(x)
    assert bio_modules(bio)["first.weight"].rejuvenate_units() == 1
    torch.testing.assert_close(bio(x), expected, **EXACT)  # what is constant can go unnoticed
    (unit,) = (bio.get_parameter("second.weight") == 0).all(1).nonzero().flatten().tolist()
    changed = (bio.get_parameter("first.weight") != before["first.weight"]).all(0)
    assert changed.nonzero().flatten().tolist() == [unit]
    assert float(bio.get_parameter("first.bias")[unit].detach()) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
        lambda p: torch.optim.Adam(p, 0.01, foreach=True, amsgrad=True),
        lambda p: torch.optim.AdamW(p, 0.01, fused=True),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
        lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.5),
        lambda p: torch.optim.Adadelta(p, 0.01),
        lambda p: torch.optim.Adamax(p, 0.01),
        lambda p: torch.optim.Rprop(p, 0.01),
    ],
)
def test_an_optimizer_knows_no_more_of_new_synapses_than_of_any_at_the_start(make: Any) -> None:
    bio = watched(mlp(), unit_turnover_maturity=0, unit_turnover_rate=0.125)
    optimizer, start = make(bio.parameters()), make([nn.Parameter(torch.ones(1, dtype=torch.float64))])
    train(bio, torch.randn(6, 5, dtype=torch.float64), optimizer, 3)
    known = {
        parameter: {name: held.clone() for name, held in state.items() if isinstance(held, Tensor)}
        for parameter, state in optimizer.state.items()
    }
    (fresh,) = start.param_groups[0]["params"]
    fresh.grad = torch.zeros_like(fresh)
    start.step()
    assert bio_modules(bio)["0.weight"].rejuvenate_units(optimizer) == 1
    (unit,) = (bio.get_parameter("2.weight") == 0).all(0).nonzero().flatten().tolist()
    for path, index in (("0.weight", (unit,)), ("0.bias", (unit,)), ("2.weight", (slice(None), unit))):
        parameter = bio.get_parameter(path)
        for name, held in optimizer.state[parameter].items():
            if isinstance(held, Tensor) and held.shape == parameter.shape:
                at_start = 0 if name == "exp_inf" else start.state[fresh][name]  # at least eps after a step
                assert bool((held[index] == at_start).all()), name
                elsewhere = torch.ones(held.shape, dtype=torch.bool)
                elsewhere[index] = False
                assert torch.equal(held[elsewhere], known[parameter][name][elsewhere]), name


def test_a_rule_at_every_third_step_counts_runs() -> None:
    """Ages, the rate and the decay are per run, and the activity is the mean over the steps between."""
    bio = watched(mlp(), unit_turnover_maturity=100)
    optimizer = torch.optim.SGD(bio.parameters(), 0.0)
    biofx.attach(bio, optimizer, [Rule("rejuvenate_units", every=3, after=2)])
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    for batch in x:
        train(bio, batch, optimizer, 1)
    state = bio_modules(bio)["0.weight"]
    assert state.unit_age.tolist() == [2] * 8  # type: ignore[union-attr]
    size = torch.tanh(bio.get_submodule("0")(x)).abs().mean(1) * bio.get_parameter("2.weight").abs().sum(0)
    first, second = size[:3].mean(0), size[3:].mean(0)
    torch.testing.assert_close(state.unit_utility, 0.99 * 0.01 * first + 0.01 * second, **EXACT)


def test_what_the_host_remembers_gives_way_to_what_is_loaded() -> None:
    """Ages and what is due are read again where another has written to their buffers."""
    bio = watched(mlp(), unit_turnover_maturity=2, unit_turnover_rate=0.25)
    state, x = bio_modules(bio)["0.weight"], torch.randn(3, 5, dtype=torch.float64)
    saved = {name: value.clone() for name, value in bio.state_dict().items()}
    counts = []
    for _ in range(2):
        for _ in range(4):
            bio(x)
            counts.append(state.rejuvenate_units())
        bio.load_state_dict(saved)
    assert counts[:4] == counts[4:] == [0, 0, 2, 1]
    assert state.rejuvenate_units() == 0  # nothing has been seen since
    assert not state.unit_age.any()  # type: ignore[union-attr]
    factors = torch.ones(8, 5)
    factors[0] = 0
    state.fuzzy_learning_rate_parameters = factors
    state.unit_age.fill_(9)  # type: ignore[union-attr]
    bio(x)
    assert state.rejuvenate_units() == 1  # a quarter of seven
