from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx.diagnostics import Monitor
from biofx.errors import NonFiniteWeightError
from biofx.operators.sampling import generator_for
from biofx.plasticity.connections import ConnectionLayout, draw_connections, mask_of
from biofx.plasticity.turnover import turn_over

CONFIG: dict[str, Any] = {"weight_density": 0.4, "apply_dales_principle": True, "rejuvenation_turnover": 0.2}
PATHS = ("0.weight", "2.weight", "4.weight")


def made(shape: tuple[int, ...], density: float = 0.3, *, layout: ConnectionLayout | None = None) -> Any:
    """A weight, its mask and its layout."""
    generator = torch.Generator().manual_seed(1)
    layout = layout or ConnectionLayout()
    weight = torch.randn(shape, generator=generator)
    connections = layout.split(weight)[0]
    allowed = torch.rand(connections.shape, generator=generator) < 0.8
    exists = draw_connections(allowed, None, [density], generator)
    mask = layout.join(mask_of(exists, allowed), weight).contiguous()
    return torch.where(mask == 1, weight, 0), mask, layout


def moved(weight: Tensor, mask: Tensor, layout: ConnectionLayout, **options: Any) -> Any:
    given: dict[str, Any] = {"protection": 2.0, "generator": generator_for(0, "w"), **options}
    return turn_over(weight, mask, layout, **given)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((40, 30), ConnectionLayout()),
        ((60, 20), ConnectionLayout(gates=3)),
        ((8, 6, 3, 3), ConnectionLayout(groups=2)),
        ((12, 5, 3), ConnectionLayout(output_axis=1, groups=3)),
    ],
)
def test_as_many_connections_grow_as_vanish_and_nothing_else_changes(
    shape: tuple[int, ...], layout: ConnectionLayout
) -> None:
    weight, mask, _ = made(shape, layout=layout)
    before, old = weight.clone(), mask.clone()
    found = moved(weight, mask, layout)
    gone, new = (old == 1) & (mask == 0), (old == 0) & (mask == 1)
    touched = torch.zeros_like(mask, dtype=torch.bool).view(-1)
    touched[found.places] = True
    touched = touched.view(shape)
    assert int(gone.sum()) == int(new.sum()) > 0
    assert int((mask == 1).sum()) == int((old == 1).sum())
    assert torch.equal(mask == -1, old == -1)
    assert (touched | ~(gone | new)).all()
    assert torch.equal(weight[~touched], before[~touched])
    assert (weight[mask != 1] == 0).all()
    assert (weight[new] != 0).all()
    again = touched & ~gone & ~new  # vanished, and grown in the same place
    assert int(gone.sum()) + int(again.sum()) == found.pruned
    each = layout.split(mask)
    assert (each == each[0]).all()


def test_each_connection_vanishes_with_the_chance_of_rejuvenation() -> None:
    weight = torch.zeros(1, 120000)
    mask = torch.zeros(1, 120000)
    mask[0, :60000] = 1
    weight[0, :60000] = torch.tensor([0.1, 0.5, 1.0]).repeat(20000) * torch.tensor([1.0, -1.0]).repeat(30000)
    spread = weight[0, :60000].std(correction=0)
    before = weight.clone()
    moved(weight, mask, ConnectionLayout(), protection=3.0)
    for magnitude in (0.1, 0.5, 1.0):
        held = before[0].abs() == torch.tensor(magnitude)
        share = float((weight[0, held] != before[0, held]).float().mean())
        expected = math.exp(-3 * magnitude / float(spread))
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / 20000)


def test_connections_grow_evenly_where_they_may() -> None:
    counts = torch.zeros(10, 10)
    for seed in range(400):
        weight, mask = torch.eye(10) * torch.linspace(0.1, 1, 10), torch.eye(10)
        mask[:, 9] = torch.where(mask[:, 9] == 1, 1, -1)
        weight[9, 9] = 100
        old = mask.clone()
        moved(weight, mask, ConnectionLayout(), protection=1e-3, generator=generator_for(seed, "w"))
        counts += (mask == 1) & (old != 1)
        assert int((mask == 1).sum()) == 10
    assert (counts[:9, 9] == 0).all()
    off = counts[:, :9][torch.eye(10)[:, :9] == 0]
    # nine or ten of 91 places are taken each time: about 43 of 400, with a standard deviation of 6
    assert (off - off.mean()).abs().max() < 4.5 * math.sqrt(off.mean())
    assert 30 < off.mean() < 45


def test_new_weights_are_like_those_that_stay_and_have_the_signs_of_their_units() -> None:
    weight, mask, layout = made((300, 300), 0.2)
    sign = torch.ones(1, 300)
    sign[:, 150:] = -1
    weight.abs_().mul_(sign)
    before, old = weight.clone(), mask.clone()
    moved(weight, mask, layout, sign=sign, protection=4.0)
    new = (old == 0) & (mask == 1)
    assert (weight * sign >= 0).all()
    staying = (weight == before) & (mask == 1)
    logs, expected = weight[new].abs().log(), before[staying].abs().log()
    assert abs(float(logs.mean() - expected.mean())) < 4 * float(expected.std()) / math.sqrt(int(new.sum()))
    assert float(logs.std()) == pytest.approx(float(expected.std()), rel=0.1)


def test_counts_of_each_block_stay() -> None:
    layout, areas = ConnectionLayout(), ((30, 10), (20, 20))
    blocks = layout.blocks(torch.Size((40, 40)), areas)
    generator = torch.Generator().manual_seed(0)
    allowed = blocks != 1
    exists = draw_connections(allowed, blocks, [0.5, 0, 0.1, 0.2], generator)
    mask, weight = mask_of(exists, allowed), torch.randn(40, 40, generator=generator)
    before = [int((mask[blocks == number] == 1).sum()) for number in range(4)]
    assert before == [300, 0, 20, 40]
    for event in range(20):
        moved(weight, mask, layout, blocks=blocks, generator=generator_for(0, "w", event))
    assert [int((mask[blocks == number] == 1).sum()) for number in range(4)] == before
    assert int(((mask == 1) != exists).sum()) > 100


def test_weights_that_are_not_finite_are_an_error_only_where_a_connection_exists() -> None:
    weight, mask, layout = made((10, 10))
    weight[mask != 1] = torch.nan
    moved(weight, mask, layout)
    assert weight.isfinite().all()
    weight[tuple((mask == 1).nonzero()[0])] = torch.inf
    held, old = weight.clone(), mask.clone()
    with pytest.raises(NonFiniteWeightError, match="found 1 that are NaN or infinite"):
        moved(weight, mask, layout)
    assert torch.equal(weight, held)
    assert torch.equal(mask, old)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_a_weight_without_connections_or_without_spread_stays(density: float) -> None:
    mask = torch.full((3, 3), density)
    weight = torch.full((3, 3), density)
    assert moved(weight, mask, ConnectionLayout()).pruned == 0
    assert torch.equal(mask, torch.full((3, 3), density))


# in a model


def mask(bio: nn.Module, path: str) -> Tensor:
    return bio.get_buffer(path.replace("weight", "bio_mod.connection_mask"))


def train(bio: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (bio(x) - 1).square().sum().backward()
        optimizer.step()


RULES = [biofx.Rule("rejuvenate_weights", every=3), biofx.Rule("crystallize"), biofx.Rule("synaptic_scaling")]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_counts_stay_and_nothing_is_left_of_missing_connections_over_many_steps(
    mlp: nn.Module, vectors: Tensor, optimizer: Any
) -> None:
    bio, _ = biofx.transform(mlp, CONFIG)
    counts = {path: int((mask(bio, path) == 1).sum()) for path in PATHS}
    first = {path: mask(bio, path).clone() for path in PATHS}
    training = optimizer(bio.parameters(), lr=0.02, weight_decay=0.05)
    biofx.attach(bio, training, RULES)
    for _ in range(20):
        train(bio, training, vectors, 10)
        for path in PATHS:
            assert int((mask(bio, path) == 1).sum()) == counts[path]
            assert (bio.get_parameter(path)[mask(bio, path) != 1] == 0).all()
        assert biofx.check(bio).ok
    assert not torch.equal(mask(bio, "0.weight"), first["0.weight"])
    garbled = copy.deepcopy(bio)
    with torch.no_grad():
        for path in PATHS:
            garbled.get_parameter(path)[mask(garbled, path) != 1] = 1e3
    assert torch.equal(garbled(vectors), bio(vectors))


@pytest.mark.filterwarnings("ignore::biofx.BiofxWarning")  # of factors that Adam undoes
def test_an_optimizer_forgets_the_direction_of_moved_connections_and_lends_new_ones_a_step_size(
    mlp: nn.Module, vectors: Tensor
) -> None:
    bio, _ = biofx.transform(mlp, CONFIG)
    optimizer = torch.optim.Adam(bio.parameters(), lr=0.01)
    train(bio, optimizer, vectors, 5)
    weight = bio.get_parameter("0.weight")
    moments = {name: optimizer.state[weight][name].clone() for name in ("exp_avg", "exp_avg_sq")}
    old, before = mask(bio, "0.weight").clone(), weight.detach().clone()
    state: Any = bio.get_submodule("0").bio_mod
    state.config = state.config.replace(rejuvenation_turnover=0.6)
    state.rejuvenate_weights(optimizer)
    touched = (mask(bio, "0.weight") != old) | (weight.detach() != before)
    grown = (mask(bio, "0.weight") == 1) & (old != 1)
    assert grown.any()
    found = optimizer.state[weight]
    assert torch.equal(found["exp_avg"], torch.where(touched, 0, moments["exp_avg"]))
    settled = (mask(bio, "0.weight") == 1) & ~touched
    mean = moments["exp_avg_sq"][settled].mean()
    assert (moments["exp_avg_sq"][grown] == 0).all()
    torch.testing.assert_close(found["exp_avg_sq"], torch.where(grown, mean, moments["exp_avg_sq"]))


def test_a_run_continues_from_its_checkpoint_to_the_bit(
    mlp: nn.Module, vectors: Tensor, tmp_path: Path
) -> None:
    def started() -> tuple[Any, torch.optim.Optimizer, Any]:
        bio, _ = biofx.transform(mlp, CONFIG)
        optimizer = torch.optim.AdamW(bio.parameters(), lr=0.02)
        return bio, optimizer, biofx.attach(bio, optimizer, RULES)

    bio, optimizer, plasticity = started()
    train(bio, optimizer, vectors, 10)
    biofx.save(bio, tmp_path / "run.pt", optimizer=optimizer, plasticity=plasticity)
    mask_at_save = mask(bio, "0.weight").clone()
    train(bio, optimizer, vectors, 10)
    other, restarted, again = started()
    biofx.load(tmp_path / "run.pt", other, optimizer=restarted, plasticity=again)
    train(other, restarted, vectors, 10)
    for name, value in bio.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    fresh = biofx.transform(mlp, CONFIG).graph_module
    assert not torch.equal(mask(fresh, "0.weight"), mask(bio, "0.weight"))
    assert torch.equal(mask(biofx.load(tmp_path / "run.pt", mlp), "0.weight"), mask_at_save)


def test_a_copied_run_goes_on_as_the_original(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, CONFIG)
    optimizer = torch.optim.AdamW(bio.parameters(), lr=0.02)
    plasticity = biofx.attach(bio, optimizer, RULES)
    train(bio, optimizer, vectors, 8)
    other, own, _ = copy.deepcopy((bio, optimizer, plasticity))
    train(bio, optimizer, vectors, 8)
    train(other, own, vectors, 8)
    for name, value in bio.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_rules_that_compare_with_a_mean_count_connections_alone(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, {"weight_density": 0.25, "base_lr": 1.0, "lr_variability": 0.0})
    state: Any = bio.get_submodule("0").bio_mod
    exists = mask(bio, "0.weight") == 1
    held = bio.get_parameter("0.weight").detach()[exists].abs()
    expected = torch.exp(-2 * held / (held + held.mean()))
    torch.testing.assert_close(state.volume_factors()[exists], expected)
    bio(vectors).sum().backward()
    gradient: Any = bio.get_parameter("0.weight").grad
    rates = state.fuzzy_learning_rate_parameters
    gradient.copy_(held.mean() * 1.01 * exists * rates)  # shaken: above the mean of those that exist
    assert state.crystallize() == int(exists.sum())
    gradient.copy_(held.mean() * 0.99 * exists * rates)
    assert state.crystallize() == 0


def test_factors_that_follow_weights_compare_with_connections_that_exist(mlp: nn.Module) -> None:
    options: dict[str, Any] = {
        "fuzzy_lr_distribution": "weight_adaptive",
        "fuzzy_lr_min": 0,
        "fuzzy_lr_max": 3,
    }
    for dynamic in (False, True):
        bio, _ = biofx.transform(mlp, {**options, "weight_density": 0.25, "fuzzy_lr_dynamic": dynamic})
        state: Any = bio.get_submodule("0").bio_mod
        if dynamic:
            state.update_fuzzy_learning_rates()
        exists, weight = mask(bio, "0.weight") == 1, bio.get_parameter("0.weight").detach().abs()
        spread = (2 - weight / weight[exists].mean()).clamp(0.5, 1.5)
        found = state.fuzzy_learning_rate_parameters
        torch.testing.assert_close(found, 1 + 0.16 * spread * state.noise)


def test_strengths_are_those_of_connections_that_exist(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, {"weight_density": 0.5})
    weight, exists = bio.get_parameter("0.weight"), mask(bio, "0.weight") == 1
    expected = weight.detach().abs().sum(1)
    with torch.no_grad():
        weight[~exists] = 5.0
        bio.get_submodule("0").bio_mod.synaptic_scaling()  # type: ignore[operator, union-attr]
        assert (weight[~exists] == 0).all()
        weight.mul_(2)
        state: Any = bio.get_submodule("0").bio_mod
        torch.testing.assert_close(state.target_strength, expected)


def test_the_monitor_records_density_and_turnover(mlp: nn.Module, vectors: Tensor, tmp_path: Path) -> None:
    bio, _ = biofx.transform(mlp, CONFIG)
    optimizer, monitor = torch.optim.SGD(bio.parameters(), lr=0.01), Monitor(path=tmp_path / "run.jsonl")
    biofx.attach(bio, optimizer, [biofx.Rule("rejuvenate_weights", every=2)], observers=[monitor])
    train(bio, optimizer, vectors, 4)
    records = [record.layers["0.weight"] for record in monitor.records]
    count = int((mask(bio, "0.weight") == 1).sum())
    assert [record.connections for record in records] == [count] * 4
    assert [record.density for record in records] == [count / 24] * 4
    assert [record.turnover for record in records] == [record.replaced / count for record in records]
    assert sum(record.replaced for record in records) > 0
    assert Monitor.read(tmp_path / "run.jsonl").records == monitor.records
    plain, _ = biofx.transform(mlp, {})
    monitor = Monitor()
    monitor.record(plain)
    record = monitor.records[0].layers["0.weight"]
    assert (record.connections, record.density, record.existing) == (None, None, 24)


def test_averages_of_a_run_keep_what_existed_for_most_of_it(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = biofx.transform(mlp, {"weight_density": 0.5, "fuzzy_lr_distribution": "baseline"})
    averaged = torch.optim.swa_utils.AveragedModel(bio, use_buffers=True)
    other = copy.deepcopy(bio)
    place = tuple((mask(bio, "0.weight") == 1).nonzero()[0].tolist())
    fresh = tuple((mask(bio, "0.weight") == 0).nonzero()[0].tolist())
    with torch.no_grad():
        mask(other, "0.weight")[place], mask(other, "0.weight")[fresh] = 0, 1
    for model in (bio, bio, bio, other):
        averaged.update_parameters(model)
    held = averaged.module.get_buffer("0.bio_mod.connection_mask")
    assert (float(held[place]), float(held[fresh])) == (0.75, 0.25)
    assert torch.equal(averaged(vectors), bio(vectors))
    bio.load_state_dict(averaged.module.state_dict())
    assert set(mask(bio, "0.weight").unique().tolist()) == {0.0, 1.0}
    assert mask(bio, "0.weight")[place] == 1


# growth by gradient


def test_connections_grow_where_the_gradient_is_largest_and_descend_it() -> None:
    weight, mask, layout = made((40, 30))
    gradient = torch.randn(40, 30, generator=torch.Generator().manual_seed(5))
    gradient[0, 0] = torch.nan
    old, before = mask.clone(), weight.clone()
    moved(weight, mask, layout, gradient=gradient)
    staying = (old == 1) & (weight == before)
    possible = (old != -1) & ~staying
    count = int((mask == 1).sum()) - int(staying.sum())
    steepest = torch.where(possible, gradient.abs().nan_to_num(0.0), -1).flatten().topk(count).indices
    new = torch.zeros(1200, dtype=torch.bool)
    new[steepest] = True
    assert torch.equal((mask == 1) & ~staying, new.view(40, 30))
    assert (weight * gradient.nan_to_num(0.0))[new.view(40, 30)].max() < 0


def test_a_unit_without_gradient_grows_at_random_and_signs_come_first() -> None:
    weight, mask, layout = made((20, 20))
    old = mask.clone()
    moved(weight, mask, layout, gradient=torch.zeros(20, 20))
    first = ((old == 0) & (mask == 1)).nonzero()
    assert len(set(first[:, 0].tolist())) > 3  # not the first rows alone
    weight, mask, layout = made((20, 20))
    old = mask.clone()
    moved(weight.abs_(), mask, layout, gradient=torch.ones(20, 20), sign=torch.ones(1, 20))
    assert (weight >= 0).all()


GROWING: dict[str, Any] = {
    "weight_density": 0.4,
    "fuzzy_lr_distribution": "baseline",
    "rejuvenation_growth": "gradient",
    "rejuvenation_turnover": 0.3,
}


def dense_gradient(bio: nn.Module, x: Tensor, path: str) -> Tensor:
    """The gradient of every connection, by hand: of a plain network with the effective weights."""
    plain = nn.Sequential(
        *(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4, bias=False), nn.ReLU(), nn.Linear(4, 2))
    )
    plain.load_state_dict({name: value.detach() for name, value in bio.named_parameters()})
    with torch.no_grad():
        for each in PATHS:
            plain.get_parameter(each).mul_(mask(bio, each) == 1)
    (plain(x) - 1).square().sum().backward()
    gradient = plain.get_parameter(path).grad
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_attached_the_gradient_of_missing_connections_decides_and_no_optimizer_sees_it(
    mlp: nn.Module, vectors: Tensor, optimizer: Any
) -> None:
    bio, _ = biofx.transform(mlp, GROWING)
    still = copy.deepcopy(bio)
    training, plain = optimizer(bio.parameters(), lr=0.02), optimizer(still.parameters(), lr=0.02)
    biofx.attach(bio, training, [biofx.Rule("rejuvenate_weights", every=3, after=1)])
    biofx.attach(still, plain)
    state: Any = bio.get_submodule("0").bio_mod
    for step in range(9):
        is_due = step % 3 == 1
        assert state.connection_probe.requires_grad == is_due
        expected = dense_gradient(bio, vectors, "0.weight")
        old, before = mask(bio, "0.weight").clone(), copy.deepcopy((bio.state_dict(), training.state_dict()))
        training.zero_grad()
        (bio(vectors) - 1).square().sum().backward()
        gradient: Any = bio.get_parameter("0.weight").grad
        assert torch.equal(gradient[old != 1], torch.zeros(int((old != 1).sum())))
        if is_due:
            torch.testing.assert_close(state.connection_probe.grad, expected)
        training.step()
        if is_due:  # the step itself is that of a model which grows nothing
            still.load_state_dict(before[0])
            plain.load_state_dict(before[1])
            plain.zero_grad()
            (still(vectors) - 1).square().sum().backward()
            plain.step()
            after = still.get_parameter("0.weight").detach()
            weight = bio.get_parameter("0.weight").detach()
            staying = (mask(bio, "0.weight") == 1) & (weight == after)
            new = (mask(bio, "0.weight") == 1) & ~staying
            left = (old != -1) & ~staying
            assert torch.equal(
                new.flatten().nonzero().flatten(),
                torch.where(left, expected.abs(), -1).flatten().topk(int(new.sum())).indices.sort().values,
            )
        assert int((mask(bio, "0.weight") == 1).sum()) == int((old == 1).sum())
    assert state.connection_probe.requires_grad is False


@pytest.mark.parametrize("form", ["float32", "seed"])
def test_learning_rate_factors_do_not_say_where_connections_grow(
    mlp: nn.Module, vectors: Tensor, form: str
) -> None:
    options: dict[str, Any] = {**GROWING, "fuzzy_lr_distribution": "uniform", "fuzzy_lr_dtype": form}
    bio, _ = biofx.transform(mlp, {**options, "fuzzy_learning_rate_factor_nu": 0.9, "fuzzy_lr_min": 0.05})
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.01)
    biofx.attach(bio, optimizer, ["rejuvenate_weights"])
    (bio(vectors) - 1).square().sum().backward()
    state: Any = bio.get_submodule("0").bio_mod
    expected, old = dense_gradient(bio, vectors, "0.weight"), mask(bio, "0.weight").clone()
    factors = state.fuzzy_learning_rate_parameters.clone()
    torch.testing.assert_close(state.connection_probe.grad, expected * factors)
    gradient: Any = bio.get_parameter("0.weight").grad
    stepped = bio.get_parameter("0.weight").detach() - 0.01 * gradient
    optimizer.step()
    weight = bio.get_parameter("0.weight").detach()
    staying = (mask(bio, "0.weight") == 1) & torch.isclose(weight, stepped, rtol=1e-5, atol=0)
    new = (mask(bio, "0.weight") == 1) & ~staying
    left = torch.where((old != -1) & ~staying, expected.abs(), -1).flatten()
    assert new.any()
    assert set(left.topk(int(new.sum())).indices.tolist()) == set(new.flatten().nonzero().flatten().tolist())


def test_growth_by_gradient_outside_of_an_attachment_says_why_it_does_nothing(
    mlp: nn.Module, vectors: Tensor
) -> None:
    bio, _ = biofx.transform(mlp, GROWING)
    bio(vectors).sum().backward()
    state: Any = bio.get_submodule("0").bio_mod
    reason = "its connections grow by their gradient, which is collected for steps at which biofx.attach runs"
    assert state.why_not("rejuvenate_weights").startswith(reason)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.1)
    plasticity = biofx.attach(bio, optimizer, ["rejuvenate_weights"])
    assert state.connection_probe.requires_grad
    plasticity.detach()
    assert not state.connection_probe.requires_grad


def test_runs_that_grow_by_gradient_continue_to_the_bit(
    mlp: nn.Module, vectors: Tensor, tmp_path: Path
) -> None:
    rules = [biofx.Rule("rejuvenate_weights", every=2)]

    def started() -> tuple[Any, torch.optim.Optimizer, Any]:
        bio, _ = biofx.transform(mlp, GROWING)
        optimizer = torch.optim.AdamW(bio.parameters(), lr=0.02)
        return bio, optimizer, biofx.attach(bio, optimizer, rules)

    bio, optimizer, plasticity = started()
    train(bio, optimizer, vectors, 4)
    biofx.save(bio, tmp_path / "run.pt", optimizer=optimizer, plasticity=plasticity)
    copied, own, _ = copy.deepcopy((bio, optimizer, plasticity))
    other, restarted, again = started()
    biofx.load(tmp_path / "run.pt", other, optimizer=restarted, plasticity=again)
    first = mask(bio, "0.weight").clone()
    for model, stepping in ((bio, optimizer), (copied, own), (other, restarted)):
        train(model, stepping, vectors, 5)
    assert not torch.equal(mask(bio, "0.weight"), first)
    for name, value in bio.state_dict().items():
        assert torch.equal(value, copied.state_dict()[name]), name
        assert torch.equal(value, other.state_dict()[name]), name
    assert "probe" not in " ".join(bio.state_dict())


def test_a_model_that_grows_by_gradient_is_compiled_moved_and_deployed_like_any(
    mlp: nn.Module, vectors: Tensor
) -> None:
    bio, _ = biofx.transform(mlp, GROWING)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.02)
    biofx.attach(bio, optimizer, [biofx.Rule("rejuvenate_weights", every=2)])
    other = copy.deepcopy(bio)
    stepping = torch.optim.SGD(other.parameters(), lr=0.02)
    compiled: Any = torch.compile(other, backend="aot_eager")
    biofx.attach(compiled, stepping, [biofx.Rule("rejuvenate_weights", every=2)])
    train(bio, optimizer, vectors, 4)
    for _ in range(4):
        stepping.zero_grad()
        (compiled(vectors) - 1).square().sum().backward()
        stepping.step()
    assert torch.equal(mask(bio, "0.weight"), mask(other, "0.weight"))
    torch.testing.assert_close(bio.get_parameter("0.weight"), other.get_parameter("0.weight"))
    torch.testing.assert_close(biofx.deploy(bio)(vectors), bio.eval()(vectors))
    bio.double()
    state: Any = bio.get_submodule("0").bio_mod
    assert (state.connection_probe.requires_grad, state.connection_probe.dtype) == (True, torch.float64)
    assert biofx.check(bio).ok
