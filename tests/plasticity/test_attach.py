from __future__ import annotations

import contextlib
import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, BioModule, Distribution, OptionError, Rule, attach
from biofx.errors import PlasticityError
from biofx.plasticity.optimizer_step import LayerStep

FRONT_DOORS: dict[str, Callable[[nn.Module, BioConfig], nn.Module]] = {
    "converter": lambda model, config: biofx.BioConverter(config)(model),
    "transform": lambda model, config: biofx.transform(model, config)[0],
}
both_front_doors = pytest.mark.parametrize("front_door", FRONT_DOORS)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))


def state_of(model: nn.Module, layer: str = "0") -> BioModule:
    state = model.get_submodule(layer).bio_mod
    assert isinstance(state, BioModule)
    return state


def factors_of(model: nn.Module, layer: str = "0") -> Tensor:
    factors = state_of(model, layer).acting_factors
    assert factors is not None
    return factors


def batches(seed: int = 1, size: int = 16) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(size, 6, generator=generator)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, data: Iterator[Tensor]) -> None:
    for x in itertools.islice(data, steps):
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True).sin()).square().mean().backward()
        optimizer.step()


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# a factor reaches the weight in full, whatever the optimizer does to the scale of a gradient

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], str]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-3}, "gradient"),
    "momentum": (torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9}, "gradient"),
    "Nesterov": (torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9, "nesterov": True}, "gradient"),
    "Adam": (torch.optim.Adam, {"lr": 1e-4}, "update"),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-4}, "update"),
    "NAdam": (torch.optim.NAdam, {"lr": 1e-4}, "update"),
    "RAdam": (torch.optim.RAdam, {"lr": 1e-4}, "update"),
    "Adamax": (torch.optim.Adamax, {"lr": 1e-4}, "update"),
    "Adagrad": (torch.optim.Adagrad, {"lr": 1e-4}, "update"),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.1}, "update"),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-4}, "update"),
}


def make_optimizer(name: str, model: nn.Module, **changed: Any) -> torch.optim.Optimizer:
    cls, options, _ = OPTIMIZERS[name]
    return cls(model.parameters(), **{**options, **changed})


def random_gradients(model: nn.Module, generator: torch.Generator) -> Tensor:
    """A loss whose gradient does not depend on the weights."""
    outcome = model(torch.randn(16, 6, generator=generator))
    return (outcome * torch.randn(16, 5, generator=generator)).sum()  # type: ignore[no-any-return]


def noisy_regression(model: nn.Module, generator: torch.Generator) -> Tensor:
    """A regression on a nonlinear target, with learning rates small enough that it is far from converged."""
    x = torch.randn(16, 6, generator=generator)
    target = torch.tanh(x @ torch.linspace(-1, 1, 6)[:, None]) + torch.randn(16, 1, generator=generator)
    return (model(x) - target).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("problem", [random_gradients, noisy_regression])
@both_front_doors
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_path_length_is_proportional_to_the_factor(
    name: str, front_door: str, problem: Callable[[nn.Module, torch.Generator], Tensor]
) -> None:
    factors = torch.tensor([0.25, 1.0, 2.0])
    lengths = []
    for factor in factors:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5)) if problem is random_gradients else mlp()
        bio = FRONT_DOORS[front_door](model, BioConfig())
        factors_of(bio).fill_(factor)
        optimizer = make_optimizer(name, bio)
        assert attach(bio, optimizer).modes["0.weight"] == OPTIMIZERS[name][2]
        generator, weight, length = torch.Generator().manual_seed(1), bio.get_parameter("0.weight"), 0.0
        for _ in range(200):
            optimizer.zero_grad()
            problem(bio, generator).backward()
            before = weight.detach().clone()
            optimizer.step()
            length += float((weight.detach() - before).norm())
        lengths.append(length)
    x, y = factors.log(), torch.tensor(lengths).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert 0.97 <= slope <= 1.03


@both_front_doors
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_step_is_the_plain_step_times_the_factor(name: str, front_door: str) -> None:
    model = mlp().double()
    bio = FRONT_DOORS[front_door](model, BioConfig(fuzzy_learning_rate_factor_nu=0.5))
    plain, scaled = make_optimizer(name, model), make_optimizer(name, bio)
    attach(bio, scaled)
    before = parameters_of(model)
    for stepped, optimizer in ((model, plain), (bio, scaled)):
        train(stepped, optimizer, 1, (x.double() for x in batches()))
    for layer in ("0", "2"):
        start = before[f"{layer}.weight"]
        by_hand = start + factors_of(bio, layer) * (model.get_parameter(f"{layer}.weight") - start)
        torch.testing.assert_close(bio.get_parameter(f"{layer}.weight"), by_hand)
        assert torch.equal(bio.get_parameter(f"{layer}.bias"), model.get_parameter(f"{layer}.bias"))


# a factor of 0, and weight decay


@both_front_doors
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "momentum", "RMSprop"])
def test_factor_of_zero_freezes_to_the_bit_decay_included(name: str, front_door: str) -> None:
    bio = FRONT_DOORS[front_door](mlp(), BioConfig(fuzzy_lr_min=0.0))
    frozen = torch.arange(96).reshape(16, 6) % 3 == 0
    factors_of(bio)[frozen] = 0
    weight = bio.get_parameter("0.weight")
    before = weight.detach().clone()
    optimizer = make_optimizer(name, bio, lr=1e-2 if name == "AdamW" else 1e-3, weight_decay=0.1)
    attach(bio, optimizer)
    train(bio, optimizer, 1000 if name == "AdamW" else 100, batches())
    assert torch.equal(weight[frozen], before[frozen])
    assert (weight[~frozen] != before[~frozen]).all()


@both_front_doors
def test_free_decay_acts_in_full_where_the_factor_is_zero(front_door: str) -> None:
    bio = FRONT_DOORS[front_door](mlp(), BioConfig(fuzzy_lr_min=0.0))
    factors_of(bio)[0] = 0
    before = bio.get_parameter("0.weight").detach().clone()
    optimizer = make_optimizer("AdamW", bio, lr=1e-2, weight_decay=0.1)
    attach(bio, optimizer, decay="free")
    train(bio, optimizer, 100, batches())
    torch.testing.assert_close(bio.get_parameter("0.weight")[0], before[0] * (1 - 1e-3) ** 100)


def test_scaled_decay_is_scaled_and_free_decay_is_not() -> None:
    gradient = torch.randn(16, 6, dtype=torch.float64)
    for decay in ("scaled", "free"):
        model = mlp().double()
        bio = biofx.BioConverter()(model)
        optimizer = make_optimizer("AdamW", bio, lr=0.01, weight_decay=0.5, eps=1e-20)
        attach(bio, optimizer, decay=decay)
        weight, factors = bio.get_parameter("0.weight"), factors_of(bio)
        start = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        shrunk = -0.01 * 0.5 * start
        adam = -0.01 * gradient.sign()  # Adam's first step
        by_hand = factors * (shrunk + adam) if decay == "scaled" else shrunk + factors * adam
        torch.testing.assert_close(weight.detach(), start + by_hand)


@pytest.mark.parametrize("name", ["NAdam", "RAdam", "Adam"])
def test_free_decay_with_other_decoupled_optimizers(name: str) -> None:
    bio = biofx.BioConverter()(mlp())
    attach(bio, make_optimizer(name, bio, weight_decay=0.1, decoupled_weight_decay=True), decay="free")
    other = biofx.BioConverter()(mlp())
    with pytest.raises(PlasticityError, match=r"decay='free': .* mixes weight decay into the gradient"):
        attach(other, make_optimizer(name, other, weight_decay=0.1), decay="free")


def test_subclass_of_adamw_decays_freely_too() -> None:
    class Mine(torch.optim.AdamW):
        pass

    bio = biofx.BioConverter()(mlp())
    handle = attach(bio, Mine(bio.parameters(), weight_decay=0.1), decay="free")
    assert set(handle.modes.values()) == {"update"}


def test_unknown_decay_is_refused() -> None:
    bio = biofx.BioConverter()(mlp())
    with pytest.raises(OptionError, match="expected 'scaled' or 'free', found 'none'"):
        attach(bio, make_optimizer("SGD", bio), decay="none")


# what a training loop does


def test_param_groups_are_each_treated_by_their_own_options() -> None:
    model = mlp()
    bio = biofx.BioConverter()(model)

    def grouped(m: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [
                {"params": m.get_submodule("0").parameters(recurse=False), "lr": 0.1},
                {"params": m.get_submodule("2").parameters(recurse=False), "lr": 0.01, "weight_decay": 0.3},
            ],
            lr=1.0,
        )

    attachment, plain = attach(bio, scaled := grouped(bio)), grouped(model)
    assert attachment.modes == {"0.weight": "gradient", "2.weight": "update"}
    before = parameters_of(model)
    train(model, plain, 1, batches())
    train(bio, scaled, 1, batches())
    for layer in ("0", "2"):
        start = before[f"{layer}.weight"]
        by_hand = start + factors_of(bio, layer) * (model.get_parameter(f"{layer}.weight") - start)
        torch.testing.assert_close(bio.get_parameter(f"{layer}.weight"), by_hand)


@both_front_doors
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_accumulated_gradients_are_scaled_once(name: str, front_door: str) -> None:
    whole, parts = (copy.deepcopy(FRONT_DOORS[front_door](mlp().double(), BioConfig())) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    x = next(batches(size=24)).double()
    for bio, pieces in ((whole, 1), (parts, 3)):
        optimizer = make_optimizer(name, bio, lr=0.1)
        attach(bio, optimizer, ["crystallize"])
        for _ in range(3):
            optimizer.zero_grad()
            for piece in x.chunk(pieces):
                (bio(piece).square().mean() / pieces).backward()
            optimizer.step()
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[key], value)


def test_clipping_comes_before_scaling() -> None:
    model = mlp()
    bio = biofx.BioConverter(fuzzy_learning_rate_factor_nu=0.5)(model)
    optimizer = make_optimizer("SGD", bio, lr=1.0)
    attach(bio, optimizer)
    x, before = next(batches()), parameters_of(bio)
    for m in (model, bio):
        (m(x) * 100).square().mean().backward()
        nn.utils.clip_grad_norm_(m.parameters(), 0.5)
    optimizer.step()
    gradient = model.get_parameter("0.weight").grad
    assert gradient is not None
    torch.testing.assert_close(
        bio.get_parameter("0.weight").detach(), before["0.weight"] - factors_of(bio) * gradient
    )


@both_front_doors
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_closure_does_what_a_plain_step_does(name: str, front_door: str) -> None:
    runs = [FRONT_DOORS[front_door](mlp(), BioConfig()) for _ in range(3)]
    start = copy.deepcopy(runs[0].state_dict())
    losses: list[list[float]] = [[], [], []]
    for how, bio in enumerate(runs):
        bio.load_state_dict(start)
        optimizer = make_optimizer(name, bio, lr=0.01)
        attach(bio, optimizer, ["crystallize", "volume_dependent_lr", Rule("rejuvenate_weights", every=3)])
        for x in itertools.islice(batches(), 10):

            def closure(bio: nn.Module = bio, x: Tensor = x, optimizer: Any = optimizer) -> float:
                optimizer.zero_grad()
                loss: Tensor = bio(x).square().mean()
                loss.backward()
                return loss.item()

            if how == 0:
                losses[how].append(closure())
                optimizer.step()
            else:
                found = optimizer.step(closure) if how == 1 else optimizer.step(closure=closure)
                assert found is not None
                losses[how].append(found)
    assert losses[0] == losses[1] == losses[2]
    for bio in runs[1:]:
        assert_same(dict(bio.state_dict()), dict(runs[0].state_dict()))


class TrainerOwningTheOptimizer:
    """What Lightning does: the model configures, the trainer owns, wraps and steps with a closure."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.optimizer = module.configure_optimizers()

    def fit(self, data: Iterator[Tensor], steps: int) -> None:
        for x in itertools.islice(data, steps):

            def closure(x: Tensor = x) -> Tensor:
                loss: Tensor = self.module.training_step(x)
                self.optimizer.zero_grad()
                loss.backward()
                return loss

            self.optimizer.step(closure=closure)


class LightningStyle(nn.Module):
    def __init__(self, bio_model: nn.Module, attached: bool) -> None:
        super().__init__()
        self.bio_model, self.attached = bio_model, attached

    def training_step(self, x: Tensor) -> Tensor:
        return self.bio_model(x).square().mean()  # type: ignore[no-any-return]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW(self.bio_model.parameters(), lr=0.01)
        if self.attached:
            attach(self.bio_model, optimizer, ["crystallize"])  # the one new line
        return optimizer


def test_loop_that_owns_the_optimizer_needs_one_new_line() -> None:
    bio = biofx.BioConverter(crystal_thresh=0.1)(mlp())
    other, untouched = copy.deepcopy(bio), copy.deepcopy(bio)
    TrainerOwningTheOptimizer(LightningStyle(bio, attached=True)).fit(batches(), 20)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
    attach(other, optimizer, ["crystallize"])
    for x in itertools.islice(batches(), 20):
        optimizer.zero_grad()
        other(x).square().mean().backward()
        optimizer.step()
    assert_same(dict(bio.state_dict()), dict(other.state_dict()))
    TrainerOwningTheOptimizer(LightningStyle(untouched, attached=False)).fit(batches(), 20)
    assert not torch.equal(untouched.get_parameter("0.weight"), bio.get_parameter("0.weight"))
    assert (factors_of(bio) < factors_of(untouched)).any()


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
@both_front_doors
def test_amp_scaler_hands_over_unscaled_gradients_and_skipped_steps_do_not_count(
    name: str, front_door: str, fused: bool
) -> None:
    config = BioConfig(crystal_thresh=0.05, fuzzy_lr_distribution=Distribution.TEMPORAL)
    config = config.replace(fuzzy_lr_dynamic=True, fuzzy_lr_update_freq=1)
    plain = FRONT_DOORS[front_door](mlp(), config)
    scaled = copy.deepcopy(plain)
    schedule: list[str | Rule] = ["crystallize", Rule("rejuvenate_weights", every=4)]
    bare = make_optimizer(name, plain, lr=0.01, fused=fused)
    under_amp = make_optimizer(name, scaled, lr=0.01, fused=fused)
    attachments = attach(plain, bare, schedule), attach(scaled, under_amp, schedule)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10**6)
    for number, x in enumerate(itertools.islice(batches(), 10)):
        if number == 5:
            before = copy.deepcopy(scaled.state_dict())
            under_amp.zero_grad()
            scaler.scale((scaled(x) * torch.inf).square().mean()).backward()
            scaler.step(under_amp)
            scaler.update()
            assert_same(dict(scaled.state_dict()), dict(before))
            assert attachments[1].steps == attachments[0].steps == 5
        for model, optimizer in ((plain, bare), (scaled, under_amp)):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            if model is plain:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
    assert attachments[1].steps == 10
    # scaled by a power of two and back: exact, and so is all that follows
    assert_same(dict(scaled.state_dict()), dict(plain.state_dict()))
    assert (factors_of(plain) < 0.4).any()


def test_amp_with_clipping_after_an_explicit_unscale() -> None:
    bio = biofx.BioConverter()(mlp())
    twin = copy.deepcopy(bio)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.01, fused=True) for m in (bio, twin)]
    for model, optimizer in zip((bio, twin), optimizers, strict=True):
        attach(model, optimizer, ["crystallize"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for x in itertools.islice(batches(), 3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        scaler.scale(bio(x).square().mean()).backward()
        scaler.unscale_(optimizers[0])
        nn.utils.clip_grad_norm_(bio.parameters(), 0.1)
        scaler.step(optimizers[0])
        scaler.update()
        twin(x).square().mean().backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizers[1].step()
    assert_same(dict(bio.state_dict()), dict(twin.state_dict()))


def test_several_optimizers_share_a_model() -> None:
    model = mlp().double()
    bio = biofx.BioConverter()(model)
    first = torch.optim.SGD(bio.get_submodule("0").parameters(), lr=0.1)
    second = torch.optim.Adam(bio.get_submodule("2").parameters(), lr=0.1, eps=1e-20)
    attachments = attach(bio, first), attach(bio, second)
    assert [attachment.modes for attachment in attachments] == [
        {"0.weight": "gradient"},
        {"2.weight": "update"},
    ]
    assert attachments[0].left_alone == {"2.weight": "the optimizer does not hold it"}
    assert attachments[1].left_alone == {"0.weight": "the optimizer does not hold it"}
    x, before = next(batches()).double(), parameters_of(bio)
    bio(x).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in bio.named_parameters() if p.grad is not None}
    first.step()
    torch.testing.assert_close(
        bio.get_parameter("0.weight").detach(),
        before["0.weight"] - 0.1 * factors_of(bio) * gradients["0.weight"],
    )
    assert torch.equal(bio.get_parameter("2.weight"), before["2.weight"])
    second.step()
    torch.testing.assert_close(
        bio.get_parameter("2.weight").detach(),
        before["2.weight"] - 0.1 * factors_of(bio, "2") * gradients["2.weight"].sign(),
    )


def test_learning_rate_schedules_are_followed() -> None:
    bio = biofx.BioConverter()(mlp())
    optimizer = torch.optim.AdamW(bio.parameters(), lr=0.1, weight_decay=0.2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step < 2 else 1.0)
    attach(bio, optimizer, decay="free")
    before, moved = parameters_of(bio)["0.weight"], []
    for x in itertools.islice(batches(), 4):
        train(bio, optimizer, 1, iter([x]))
        scheduler.step()
        moved.append(not torch.equal(bio.get_parameter("0.weight"), before))
    assert moved == [False, False, True, True]


# refusals


def test_line_search_is_refused() -> None:
    bio = biofx.BioConverter()(mlp())
    with pytest.raises(PlasticityError, match="LBFGS searches along a line"):
        attach(bio, torch.optim.LBFGS(bio.parameters()))


def test_optimizer_of_another_model_is_refused() -> None:
    model = mlp()
    stale = make_optimizer("SGD", model)
    bio = biofx.BioConverter()(model)
    with pytest.raises(PlasticityError, match=r"holds none of them; build it from bio_model\.parameters\(\)"):
        attach(bio, stale)


def test_optimizer_that_lost_its_parameter_is_refused_at_the_next_step() -> None:
    bio = biofx.BioConverter()(mlp())
    optimizer = make_optimizer("SGD", bio)
    attach(bio, optimizer)
    bio.load_state_dict(copy.deepcopy(bio.state_dict()), assign=True)
    with pytest.raises(PlasticityError, match=r"'0\.weight' is another parameter than the one"):
        train(bio, optimizer, 1, batches())


def test_double_attachment_is_refused_until_detached() -> None:
    bio = biofx.BioConverter()(mlp())
    optimizer = make_optimizer("SGD", bio)
    attachment = attach(bio, optimizer)
    for again in (optimizer, make_optimizer("Adam", bio)):
        with pytest.raises(PlasticityError, match=r"'0\.weight' is attached to an optimizer already; detach"):
            attach(bio, again)
    attachment.detach()
    attach(bio, make_optimizer("Adam", bio))


def test_refused_attachment_leaves_no_trace() -> None:
    bio = biofx.BioConverter()(mlp())
    optimizer = make_optimizer("SGD", bio)
    with pytest.raises(
        PlasticityError, match=r"schedule: enforce_dales_principle has nothing to act on \(0\.wei"
    ):
        attach(bio, optimizer, ["enforce_dales_principle"])
    attach(bio, optimizer)


def test_forgotten_optimizer_gives_its_weights_free() -> None:
    bio = biofx.BioConverter()(mlp())
    attach(bio, make_optimizer("SGD", bio))
    import gc

    gc.collect()
    handle = attach(bio, make_optimizer("SGD", bio))
    assert handle.steps == 0
    assert set(handle.modes.values()) == {"gradient"}


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            ["rejuvenate_weight"],
            "no layer offers a rule 'rejuvenate_weight'; did you mean 'rejuvenate_weights'",
        ),
        (["fuzzy_learning_rates"], "fuzzy_learning_rates acts at every step already; leave it out"),
        ([3], "expected rules or their names, found 3"),
    ],
)
def test_schedule_is_checked(schedule: list[Any], message: str) -> None:
    bio = biofx.BioConverter()(mlp())
    with pytest.raises(OptionError, match=message):
        attach(bio, make_optimizer("SGD", bio), schedule)


@pytest.mark.parametrize("options", [{"every": 0}, {"after": -1}, {"after": 5, "until": 5}, {"every": 1.5}])
def test_rules_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"rule 'crystallize': (every|after|until)"):
        Rule("crystallize", **options)


def test_model_that_is_not_transformed_is_refused() -> None:
    model = mlp()
    with pytest.raises(
        PlasticityError, match="expected a transformed or converted model, found a Sequential"
    ):
        attach(model, make_optimizer("SGD", model))


# the schedule


def test_rules_run_when_they_are_due() -> None:
    bio = biofx.BioConverter(rejuvenation_parameter_dre=0.1)(mlp())
    ran: dict[str, list[int]] = {"rejuvenate_weights": [], "synaptic_scaling": [], "crystallize": []}

    def observe(step: int, layers: Any) -> None:
        for name, steps in ran.items():
            if name in layers["0.weight"].touched:
                steps.append(step)

    optimizer = make_optimizer("SGD", bio)
    rules = [
        Rule("rejuvenate_weights", every=3, after=2, until=9),
        Rule("synaptic_scaling", until=2),
        Rule("crystallize", every=5),
        Rule("crystallize", after=7, until=8),
    ]
    attachment = attach(bio, optimizer, rules, observers=[observe])
    events = []
    for _ in range(12):
        train(bio, optimizer, 1, batches())
        counted = state_of(bio).events
        events.append(counted)
    assert ran == {"rejuvenate_weights": [2, 5, 8], "synaptic_scaling": [0, 1], "crystallize": [0, 5, 7, 10]}
    assert events == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    assert attachment.steps == 12


def test_dynamic_factors_change_at_every_step_unless_scheduled() -> None:
    config = BioConfig(
        fuzzy_lr_distribution=Distribution.TEMPORAL, fuzzy_lr_dynamic=True, fuzzy_lr_update_freq=1
    )
    changes: list[list[int]] = []
    schedules: list[list[str | Rule]] = [[], [Rule("update_fuzzy_learning_rates", every=2, until=5)]]
    for schedule in schedules:
        bio = biofx.BioConverter(config)(mlp())
        optimizer = make_optimizer("SGD", bio)
        attach(bio, optimizer, schedule)
        changes.append([])
        for step in range(6):
            before = factors_of(bio).clone()
            train(bio, optimizer, 1, batches())
            if not torch.equal(before, factors_of(bio)):
                changes[-1].append(step)
    assert changes == [[0, 1, 2, 3, 4, 5], [0, 2, 4]]


@both_front_doors
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_crystallization_comes_before_scaling_and_sees_unscaled_gradients(name: str, front_door: str) -> None:
    model = mlp()
    config = BioConfig(fuzzy_learning_rate_factor_nu=0.9, fuzzy_lr_min=0.1, crystal_thresh=0.05)
    bio = FRONT_DOORS[front_door](model, config)
    optimizer, plain = make_optimizer(name, bio, lr=0.1), make_optimizer(name, model, lr=0.1)
    attach(bio, optimizer, ["crystallize"])
    weight, before = model.get_parameter("0.weight"), factors_of(bio).clone()
    start = weight.detach().clone()
    train(bio, optimizer, 1, batches())
    train(model, plain, 1, batches())
    gradient = weight.grad
    assert gradient is not None
    strength, magnitude = gradient.abs(), start.abs()
    caught = ((strength / magnitude < 0.05) & (strength > 0)) | (strength > magnitude.mean())
    assert 0 < caught.sum() < caught.numel()
    dampened = torch.where(caught, before * 0.6, before)
    torch.testing.assert_close(factors_of(bio), dampened)
    by_hand = start + dampened * (weight.detach() - start)
    torch.testing.assert_close(bio.get_parameter("0.weight").detach(), by_hand)


@both_front_doors
def test_changing_factors_act_on_the_gradient_once_and_as_they_are(front_door: str) -> None:
    """The graph scales by the factors of before the step; those of the step are what must count."""
    model = mlp()
    config = BioConfig(fuzzy_lr_distribution=Distribution.TEMPORAL, fuzzy_lr_dynamic=True)
    bio = FRONT_DOORS[front_door](model, config.replace(fuzzy_lr_update_freq=1, fuzzy_lr_decay=0.0))
    optimizer, plain = make_optimizer("SGD", bio, lr=0.1), make_optimizer("SGD", model, lr=0.1)
    attach(bio, optimizer)
    for x in itertools.islice(batches(), 3):
        model.load_state_dict({k: v for k, v in bio.state_dict().items() if "bio_mod" not in k})
        start, old = parameters_of(model)["0.weight"], factors_of(bio).clone()
        train(bio, optimizer, 1, iter([x]))
        train(model, plain, 1, iter([x]))
        assert not torch.equal(factors_of(bio), old)
        by_hand = start + factors_of(bio) * (model.get_parameter("0.weight").detach() - start)
        torch.testing.assert_close(bio.get_parameter("0.weight").detach(), by_hand)


def test_volume_acts_on_the_update_of_adam_too() -> None:
    model = mlp()
    config = BioConfig(lr_variability=0.0, base_lr=0.5)
    bio = biofx.transform(model, config)[0]
    optimizer, plain = make_optimizer("Adam", bio, lr=0.1), make_optimizer("Adam", model, lr=0.1)
    attach(bio, optimizer, ["volume_dependent_lr"])
    start = parameters_of(model)["0.weight"]
    train(bio, optimizer, 1, batches())
    train(model, plain, 1, batches())
    volume = 0.5 * (-2 * start.abs() / (start.abs() + start.abs().mean())).exp()
    by_hand = start + volume * factors_of(bio) * (model.get_parameter("0.weight").detach() - start)
    torch.testing.assert_close(bio.get_parameter("0.weight").detach(), by_hand)


def relu_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 1))


@both_front_doors
def test_signs_are_written_back_before_synapses_are_replaced(front_door: str) -> None:
    config = BioConfig(apply_dales_principle=True, rejuvenation_parameter_dre=0.3)
    bio = FRONT_DOORS[front_door](relu_net(), config)
    optimizer = make_optimizer("SGD", bio, lr=1.0)
    order: list[str] = []
    attach(
        bio,
        optimizer,
        ["rejuvenate_weights", "crystallize"],
        observers=[lambda _, layers: order.extend(layers["2.weight"].touched)],
    )
    sign = state_of(bio, "2").presynaptic_signs()
    assert set(sign.tolist()) == {-1, 1}
    for _ in range(3):
        train(bio, optimizer, 1, batches())
        assert (bio.get_parameter("2.weight") * sign >= 0).all()
    assert order == ["crystallize", "enforce_dales_principle", "rejuvenate_weights"] * 3


def test_rules_of_ones_own_are_scheduled_like_any_other() -> None:
    class Halving(BioModule):
        exposed_functions = (*BioModule.exposed_functions, "halve")

        def halve(self) -> None:
            self.weight.data.mul_(0.5)

    class HalvingConverter(biofx.BioConverter):
        def _bio_modulize(self, module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                module.add_module("bio_mod", Halving(module, config=self.config))

    bio = HalvingConverter()(mlp())
    optimizer = make_optimizer("SGD", bio, lr=0.0)
    attach(bio, optimizer, [Rule("halve", every=2)])
    before = parameters_of(bio)
    train(bio, optimizer, 3, batches())
    for layer in ("0", "2"):
        assert torch.equal(bio.get_parameter(f"{layer}.weight"), before[f"{layer}.weight"] / 4)


def test_crystallization_starts_from_ones_where_there_are_no_factors() -> None:
    model = mlp()
    bio, _ = biofx.transform(
        model, BioConfig(fuzzy_lr_distribution=Distribution.BASELINE, crystal_thresh=1e6)
    )
    optimizer = make_optimizer("Adam", bio, lr=0.1)
    attach(bio, optimizer, ["crystallize"])
    start = parameters_of(model)["0.weight"]
    train(bio, optimizer, 1, batches())
    train(model, make_optimizer("Adam", model, lr=0.1), 1, batches())
    assert torch.equal(factors_of(bio), torch.full((16, 6), 0.6))
    by_hand = start + 0.6 * (model.get_parameter("0.weight").detach() - start)
    torch.testing.assert_close(bio.get_parameter("0.weight").detach(), by_hand)


def test_rules_follow_the_options_given_to_transform() -> None:
    config = BioConfig(fuzzy_lr_distribution=Distribution.BASELINE, rejuvenation_turnover=1.0)
    bio, _ = biofx.transform(mlp(), config.override("2", rejuvenation_turnover=1e-6))
    counts: dict[str, int] = {}
    optimizer = make_optimizer("SGD", bio)
    attach(
        bio,
        optimizer,
        ["rejuvenate_weights"],
        observers=[lambda _, ls: counts.update({p: s.touched["rejuvenate_weights"] for p, s in ls.items()})],
    )
    train(bio, optimizer, 1, batches())
    assert counts == {"0.weight": 96, "2.weight": 0}


# what has no gradient, or no parameter


class Partial(nn.Module):
    """One layer is frozen, one is never used, one is parametrized, one is used every second time."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.frozen, self.unused = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.computed = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
        self.side = nn.Linear(6, 6)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.computed(self.frozen(self.used(x))), self.side(x)


@both_front_doors
def test_layers_that_cannot_take_part_are_left_alone_and_named(front_door: str) -> None:
    bio = FRONT_DOORS[front_door](Partial(), BioConfig(rejuvenation_parameter_dre=0.1, crystal_thresh=1e6))
    optimizer = make_optimizer("AdamW", bio, weight_decay=0.1)
    rules = ["crystallize", "volume_dependent_lr", "rejuvenate_weights", "synaptic_scaling"]
    attachment = attach(bio, optimizer, rules)
    assert attachment.left_alone["frozen.weight"] == "it is frozen"
    assert attachment.left_alone["computed.weight"] == "it is computed by a parametrization"
    assert {"used.weight", "side.weight"} <= set(attachment.modes)
    before = parameters_of(bio)
    states = copy.deepcopy(bio.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        bio(torch.ones(2, 6))[0].square().mean().backward()
        optimizer.step()
    for name in ("frozen.weight", "unused.weight", "side.weight"):
        assert torch.equal(bio.get_parameter(name), before[name]), name
    for key, value in bio.state_dict().items():
        if key.startswith(("frozen.bio_mod", "unused.bio_mod", "side.bio_mod")):
            assert torch.equal(value, states[key]), key
    assert not torch.equal(bio.get_parameter("used.weight"), before["used.weight"])
    bio(torch.ones(2, 6))[1].square().mean().backward()
    optimizer.step()
    assert not torch.equal(bio.get_parameter("side.weight"), before["side.weight"])


def test_weight_that_is_no_number_stops_the_run_before_any_layer_is_replaced() -> None:
    bio = biofx.BioConverter(rejuvenation_turnover=1.0)(mlp())
    optimizer = make_optimizer("SGD", bio, lr=0.0)
    attach(bio, optimizer, ["rejuvenate_weights"])
    with torch.no_grad():
        bio.get_parameter("2.weight")[0, 3] = torch.nan
    before = parameters_of(bio)["0.weight"]
    bio.get_parameter("0.weight").grad = torch.zeros(16, 6)
    bio.get_parameter("2.weight").grad = torch.zeros(1, 16)
    with pytest.raises(biofx.errors.NonFiniteWeightError, match=r"2\.weight"):
        optimizer.step()
    assert torch.equal(bio.get_parameter("0.weight"), before)


# leaving, copying, wrapping


@both_front_doors
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_detaching_returns_to_plain_behaviour(name: str, front_door: str) -> None:
    """As if nothing had been attached: the converter's gradients are plain, the graph's stay scaled."""
    bio = FRONT_DOORS[front_door](mlp(), BioConfig())
    optimizer = make_optimizer(name, bio, lr=0.01)
    attachment = attach(bio, optimizer, ["crystallize", "rejuvenate_weights"])
    train(bio, optimizer, 5, batches())
    attachment.detach()
    assert not attachment.modes
    twin, own = copy.deepcopy(bio), copy.deepcopy(optimizer.state_dict())
    other = make_optimizer(name, twin, lr=0.01)
    other.load_state_dict(own)
    train(bio, optimizer, 5, batches(2))
    train(twin, other, 5, batches(2))
    assert_same(dict(bio.state_dict()), dict(twin.state_dict()))
    assert attachment.steps == 5
    attachment.detach()


def copies() -> dict[str, Callable[[nn.Module], nn.Module]]:
    def saved(model: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded: nn.Module = torch.load(file, weights_only=False)
        return loaded

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "torch.save": saved,
    }


@pytest.mark.parametrize("how", copies())
@both_front_doors
def test_copy_of_an_attached_model_is_independent_and_not_attached(how: str, front_door: str) -> None:
    bio = FRONT_DOORS[front_door](mlp(), BioConfig(crystal_thresh=1e6))
    optimizer = make_optimizer("AdamW", bio, lr=0.01)
    attach(bio, optimizer, ["crystallize", "rejuvenate_weights"])
    train(bio, optimizer, 2, batches())
    twin = copies()[how](bio)
    frozen = copy.deepcopy(twin.state_dict())
    assert_same(dict(frozen), dict(bio.state_dict()))
    train(bio, optimizer, 2, batches())
    assert_same(dict(twin.state_dict()), dict(frozen))
    assert not torch.equal(bio.get_parameter("0.weight"), frozen["0.weight"])
    own = make_optimizer("AdamW", twin, lr=0.01)
    start, factors = parameters_of(twin), factors_of(twin).clone()
    train(twin, own, 1, batches())
    assert torch.equal(factors_of(twin), factors)  # not crystallized: not attached
    assert not torch.equal(twin.get_parameter("0.weight"), start["0.weight"])
    assert attach(twin, own).modes == {"0.weight": "update", "2.weight": "update"}


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "both": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@both_front_doors
def test_wrapped_models_train_like_bare_ones(wrapper: str, front_door: str) -> None:
    config = BioConfig(crystal_thresh=0.1, rejuvenation_parameter_dre=3.0)
    bare = FRONT_DOORS[front_door](mlp(), config)
    inner = copy.deepcopy(bare)
    wrapped = WRAPPERS[wrapper](inner)
    rules: list[str | Rule] = ["crystallize", Rule("rejuvenate_weights", every=2)]
    for model in (bare, wrapped):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        attach(model, optimizer, rules)
        train(model, optimizer, 4, batches())
    for key, value in bare.state_dict().items():
        torch.testing.assert_close(inner.state_dict()[key], value)
    with pytest.raises(PlasticityError, match="attached to an optimizer already"):
        attach(inner, torch.optim.SGD(inner.parameters(), lr=0.1))


# resuming


def everything(distribution: Distribution, granularity: str) -> BioConfig:
    return BioConfig(
        fuzzy_lr_distribution=distribution,
        fuzzy_lr_dynamic=True,
        fuzzy_lr_update_freq=2,
        fuzzy_lr_decay=0.9,
        fuzzy_lr_granularity=granularity,
        crystal_thresh=0.01,
        rejuvenation_parameter_dre=4.0,
        weight_splitting_Gamma=2,
        weight_splitting_activation_function=torch.relu,
        apply_dales_principle=True,
    )


EVERY_RULE = (
    Rule("crystallize", every=2),
    "volume_dependent_lr",
    Rule("rejuvenate_weights", every=3, after=1),
    Rule("synaptic_scaling", every=2, after=3),
)


@pytest.mark.parametrize("granularity", ["element", "neuron"])
@pytest.mark.parametrize(
    "distribution",
    [Distribution.TEMPORAL, Distribution.WEIGHT_ADAPTIVE, Distribution.ACTIVITY, Distribution.LOGNORMAL],
)
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
@both_front_doors
def test_resuming_at_any_step_gives_the_same_run_to_the_bit(
    front_door: str, name: str, distribution: Distribution, granularity: str
) -> None:
    total, data = 8, list(itertools.islice(batches(), 8))

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, biofx.plasticity.attachment.Attachment]:
        torch.manual_seed(5)
        bio = FRONT_DOORS[front_door](relu_net(), everything(distribution, granularity))
        optimizer = make_optimizer(name, bio, lr=0.02, weight_decay=0.01)
        return bio, optimizer, attach(bio, optimizer, EVERY_RULE)

    bio, optimizer, attachment = fresh()
    saved = []
    for x in data:
        file = io.BytesIO()
        torch.save([bio.state_dict(), optimizer.state_dict(), attachment.state_dict()], file)
        saved.append(file)
        train(bio, optimizer, 1, iter([x]))
    assert (factors_of(bio, "2") < 0.35).any()
    for step in range(0, total, 1 if name == "SGD" else 3):
        saved[step].seek(0)
        model_state, optimizer_state, attachment_state = torch.load(saved[step])
        again, other, handle = fresh()
        again.load_state_dict(model_state)
        other.load_state_dict(optimizer_state)
        handle.load_state_dict(attachment_state)
        assert handle.steps == step
        train(again, other, total - step, iter(data[step:]))
        assert_same(dict(again.state_dict()), dict(bio.state_dict()))


def test_going_back_to_an_earlier_state_forgets_what_came_after() -> None:
    bio = biofx.BioConverter(everything(Distribution.TEMPORAL, "neuron"))(relu_net())
    optimizer = make_optimizer("SGD", bio)
    attachment = attach(bio, optimizer, EVERY_RULE)
    start = copy.deepcopy(bio.state_dict()), copy.deepcopy(optimizer.state_dict()), attachment.state_dict()
    train(bio, optimizer, 6, batches())
    end = copy.deepcopy(bio.state_dict())
    bio.load_state_dict(start[0])
    optimizer.load_state_dict(start[1])
    attachment.load_state_dict(start[2])
    assert_same(dict(bio.state_dict()), dict(start[0]))
    train(bio, optimizer, 6, batches())
    assert_same(dict(bio.state_dict()), dict(end))


def test_state_of_another_schedule_or_version_is_refused() -> None:
    bio = biofx.BioConverter()(mlp())
    attachment = attach(bio, make_optimizer("SGD", bio), ["crystallize"])
    state = attachment.state_dict()
    for wrong, message in (
        ({**state, "version": 3, "steps": 7}, "version 1 or 2, found version 3"),
        ({"steps": 7}, "version 1 or 2, found version None"),
        ({**state, "rules": [], "steps": 7}, "expected a state of the same schedule"),
    ):
        with pytest.raises(PlasticityError, match=message):
            attachment.load_state_dict(wrong)
        assert attachment.steps == 0


# observers


@both_front_doors
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_observers_see_norms_and_counts(name: str, front_door: str) -> None:
    bio = FRONT_DOORS[front_door](mlp(), BioConfig(crystal_thresh=1e6))
    seen: list[tuple[int, dict[str, LayerStep]]] = []
    optimizer = make_optimizer(name, bio, lr=0.1)
    attach(
        bio, optimizer, ["crystallize"], observers=[lambda step, layers: seen.append((step, dict(layers)))]
    )
    for number in range(2):
        optimizer.zero_grad()
        bio(next(batches(number))).square().mean().backward()
        weight = bio.get_parameter("0.weight")
        assert weight.grad is not None
        before, left = weight.detach().clone(), weight.grad.norm().item()
        optimizer.step()
        step, layers = seen[-1]
        assert step == number
        assert set(layers) == {"0.weight", "2.weight"}
        assert layers["0.weight"].gradient_norm == pytest.approx(left)
        assert layers["0.weight"].update_norm == pytest.approx((weight - before).norm().item())
        assert layers["0.weight"].touched == {"crystallize": 96}


def test_global_random_state_rests() -> None:
    bio = biofx.BioConverter(everything(Distribution.TEMPORAL, "element"))(relu_net())
    optimizer = make_optimizer("AdamW", bio)
    state = torch.get_rng_state()
    attach(bio, optimizer, EVERY_RULE)
    train(bio, optimizer, 5, batches())
    assert torch.equal(torch.get_rng_state(), state)


def test_step_that_fails_leaves_the_next_one_sound() -> None:
    bio = biofx.BioConverter()(mlp())
    twin = copy.deepcopy(bio)
    optimizers = [make_optimizer("AdamW", m, lr=0.01) for m in (bio, twin)]
    for model, optimizer in zip((bio, twin), optimizers, strict=True):
        attach(model, optimizer)

    def failing() -> float:
        raise ArithmeticError

    with contextlib.suppress(ArithmeticError):
        optimizers[0].step(failing)
    for model, optimizer in zip((bio, twin), optimizers, strict=True):
        train(model, optimizer, 3, batches())
    assert_same(dict(bio.state_dict()), dict(twin.state_dict()))


def test_a_model_without_weights_that_are_parameters_is_told_so() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    bio_model, _ = biofx.transform(model, biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.2))
    optimizer = torch.optim.AdamW(bio_model.parameters())
    with pytest.raises(PlasticityError, match="parametrizations compute all of this model's weights"):
        biofx.attach(bio_model, optimizer)
