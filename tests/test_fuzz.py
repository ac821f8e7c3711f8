"""Random models through everything, from transform to deploy; files that are not what they seem; changes.

Short by default; ``python tools/fuzz 10`` goes on for ten minutes with other numbers.
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import biofx
from biofx import BiofxError, OptionError, Rule
from biofx.consolidation_options import CONSOLIDATIONS
from biofx.plasticity.consolidated_state import HOLDING, OF_TASKS
from biofx.plasticity.model_states import prepare_states
from fuzz.random_models import random_model
from fuzz.setups import Setup
from fuzz.sweep import made_smaller, one
from fuzz.trial import run_again

EXAMPLES = int(os.environ.get("BIOFX_FUZZ_EXAMPLES", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 8,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SEEDS = range(100)
"""Of trials of changes; ``tools/fuzz`` goes on with others."""


@st.composite
def models(draw: Callable[[Any], Any]) -> tuple[nn.Module, Tensor]:
    """A nest of blocks over units of shape ``(batch, units, *)``, and an input."""
    model, shape = random_model(lambda options: draw(st.sampled_from(options)))
    return model, torch.randn(4, *shape)


CONFIGS = st.fixed_dictionaries(
    {
        "weight_splitting_Gamma": st.sampled_from([0, 2, 3]),
        "weight_splitting_mode": st.sampled_from(["neighbours", "sub-weights"]),
        "weight_splitting_rates": st.sampled_from(["sum", "mean"]),
        "weight_splitting_activation_function": st.sampled_from(["identity", "torch.tanh", "torch.nn.ReLU"]),
        "apply_dales_principle": st.booleans(),
        "weight_splitting_fold": st.booleans(),
        "dales_method": st.sampled_from(["project", "abs", "expand"]),
        "dales_initialisation": st.sampled_from(["balanced", "keep"]),
        "dales_axis": st.sampled_from(["presynaptic", "postsynaptic"]),
        "dales_constrain_inputs": st.booleans(),
        "dales_constrain_readout": st.booleans(),
        "weight_density": st.sampled_from([1.0, 0.5, 0.1]),
        "weight_mask_self_connections": st.booleans(),
        "weight_mask_initialisation": st.sampled_from(["rescale", "keep"]),
        "fuzzy_lr_distribution": st.sampled_from([member.value for member in biofx.Distribution]),
        "fuzzy_lr_granularity": st.sampled_from(["element", "neuron", "layer"]),
        "fuzzy_lr_dynamic": st.booleans(),
        "fuzzy_lr_update_freq": st.sampled_from([1, 2]),
        "rejuvenation_utility": st.sampled_from(["magnitude", "gradient"]),
        "rejuvenation_utility_decay": st.sampled_from([0.0, 0.9]),
        "rejuvenation_utility_every": st.sampled_from([1, 3]),
        "rejuvenation_redraw": st.sampled_from(["survivors", "initial", "zero"]),
        "unit_turnover": st.sampled_from(["off", "continual-backprop", "redo"]),
        "unit_turnover_rate": st.just(0.4),
        "unit_turnover_maturity": st.sampled_from([0, 2]),
        "unit_turnover_dormancy": st.just(0.5),
        "consolidation": st.sampled_from(CONSOLIDATIONS),
        "consolidation_effect": st.sampled_from(["pull", "rates"]),
        "consolidation_parameters": st.sampled_from(["weights", "all"]),
        "upgd_scaling": st.sampled_from(["network", "layer"]),
        "l2_to_initial_strength": st.sampled_from([0.0, 0.1]),
        "seed": st.integers(0, 3),
    }
)
SELECTIONS: list[dict[str, Any]] = [
    {},
    {"rejuvenation_turnover": 0.2},
    {"rejuvenation_selection": "proportion", "rejuvenation_turnover": 0.13},
    {"rejuvenation_selection": "threshold", "rejuvenation_threshold": 0.3},
]
RULES = [
    "rejuvenate_units",
    "rejuvenate_weights",
    "shrink_and_perturb",
    *HOLDING,
    "crystallize",
    "volume_dependent_lr",
    "synaptic_scaling",
    "update_fuzzy_learning_rates",
]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def attached(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Attach whatever rules have something to act on."""
    rules = [
        Rule(name, every=2 if name == "rejuvenate_weights" else 1)
        for name in RULES
        if any(state.why_never(name) is None for state in prepare_states(model).values())
    ]
    return biofx.attach(model, optimizer, rules)


def begun(plasticity: Any, x: Tensor) -> None:
    """Begin a task, if something consolidates at the end of tasks."""
    names = {rule.name for rule in plasticity.rules}
    if names & OF_TASKS:
        plasticity.begin_task([x] if "memory_aware" in names else None)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.tanh(model(x)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def equal_states(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=0, atol=0, equal_nan=True)


@fuzz
@given(models(), CONFIGS, st.sampled_from(SELECTIONS), st.booleans(), st.sampled_from(sorted(OPTIMIZERS)))
def test_a_random_model_goes_through_everything(
    given_model: tuple[nn.Module, Tensor],
    options: dict[str, Any],
    selection: dict[str, Any],
    converts: bool,
    optimizer_name: str,
) -> None:
    model, x = given_model
    before = copy.deepcopy(model.state_dict())
    config = biofx.BioConfig.from_dict(options | selection)
    try:
        bio_model: Any = (
            biofx.BioConverter(config)(model) if converts else biofx.transform(model, config).graph_module
        )
    except OptionError as error:
        if "gamma" not in str(error):
            raise
        return
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    bio_model.graph.lint()
    optimizer = OPTIMIZERS[optimizer_name](bio_model.parameters())
    plasticity = attached(bio_model, optimizer)
    begun(plasticity, x)
    train(bio_model, optimizer, x, 3)
    begun(plasticity, x)
    train(bio_model, optimizer, x, 2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pt")
        extra = {"random": torch.get_rng_state()}
        biofx.save(bio_model, path, optimizer=optimizer, plasticity=plasticity, extra=extra)
        fresh = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in fresh.parameters():
                parameter.normal_()
        loaded = biofx.load(path, fresh)
        equal_states(loaded, bio_model)
        own_optimizer = OPTIMIZERS[optimizer_name](loaded.parameters())
        own_plasticity = attached(loaded, own_optimizer)
        biofx.load(path, loaded, optimizer=own_optimizer, plasticity=own_plasticity)
    torch.set_rng_state(extra["random"])
    after = train(bio_model, optimizer, x, 2)
    torch.set_rng_state(extra["random"])
    torch.testing.assert_close(
        torch.tensor(train(loaded, own_optimizer, x, 2)), torch.tensor(after), rtol=0, atol=0, equal_nan=True
    )
    equal_states(loaded, bio_model)
    expected = bio_model.eval()(x)
    torch.testing.assert_close(loaded.eval()(x), expected, rtol=0, atol=0, equal_nan=True)
    deployed = biofx.deploy(bio_model)
    torch.testing.assert_close(deployed(x), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not [key for key in deployed.state_dict() if "bio_mod" in key]
    plain = copy.deepcopy(model)
    if any(isinstance(state, biofx.BioModule) and state.is_expanded for state in bio_model.modules()):
        with pytest.raises(biofx.errors.CheckpointError, match="whose units became"):
            biofx.checkpoints.plain_state(bio_model)
    else:
        plain.load_state_dict(biofx.checkpoints.plain_state(bio_model))


@fuzz
@given(st.binary(max_size=300), st.integers(0, 10**6), st.booleans())
@example(b"", 0, True)
def test_no_damaged_file_is_taken_for_a_checkpoint(junk: bytes, place: int, inserted: bool) -> None:
    bio_model, _ = biofx.transform(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pt")
        biofx.save(bio_model, path)
        whole = path.read_bytes()
        place %= len(whole)
        path.write_bytes(whole[:place] + junk + whole[place + (0 if inserted else len(junk)) :])
        before = copy.deepcopy(bio_model.state_dict())
        try:
            biofx.load(path, bio_model)
        except biofx.errors.CheckpointError as error:
            if str(path) not in str(error):
                raise
        for key, value in bio_model.state_dict().items():
            assert torch.equal(value, before[key])


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.text(max_size=3), max_size=2),
)


@fuzz
@given(st.dictionaries(st.sampled_from([*biofx.BioConfig().to_dict(), "nonsense"]), VALUES, max_size=4))
def test_a_hostile_config_is_refused_or_correct(options: dict[str, Any]) -> None:
    try:
        config = biofx.BioConfig.from_dict(options)
    except BiofxError:
        return
    assert biofx.BioConfig.from_dict(config.to_dict()) == config


@fuzz
@given(st.text(max_size=200))
@example('weight_splitting_activation_function = "os.system"')
@example("overrides = [[[[")
@example('seed = 1\n[[overrides]]\nselector = "re:("\nseed = 2')
def test_a_hostile_file_is_refused_or_correct(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.toml")
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        try:
            config = biofx.BioConfig.from_toml(path)
        except BiofxError:
            return
        config.to_toml(path)
        assert biofx.BioConfig.from_toml(path) == config


@fuzz
@given(st.text(max_size=60))
@example("split-weights{" * 500)
@example("scale-gradients{nu=1e999}")
def test_a_hostile_pipeline_text_is_refused_or_correct(text: str) -> None:
    try:
        pipeline = biofx.Pipeline.parse(text)
    except BiofxError:
        return
    assert biofx.Pipeline.parse(str(pipeline)) == pipeline


@pytest.mark.parametrize("name", ['quo"te', "new\nline", "import"])
def test_a_name_that_would_be_run_is_refused(name: str) -> None:
    model = nn.Sequential()
    model.add_module(name, nn.Linear(2, 2))
    with pytest.raises(biofx.CaptureError, match="cannot carry"):
        biofx.transform(model)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_happens_to_the_model_happens_to_the_result(seed: int) -> None:
    setup, changes, verdict = one(seed)
    assert verdict.outcome != "failed", f"{setup}\n{changes}\n{verdict.message}"


FINE = {
    "modes": ["m.eval()", "at(m, '3').train()", "m.train()", "m.eval()"],
    "steps": ["trained(m, lambda p: torch.optim.AdamW(p, lr=0.01), x, steps=2, attached=True)", "m.eval()"],
    "weights": ["at(m, '0').weight.data.mul_(2)", "at(m, '0').weight = nn.Parameter(torch.ones(6, 4))"],
    "sizes": ["x = batch(7)", "x = batch(2)", "m.eval()", "x = batch(1)"],
    "copies": ["m = copy.deepcopy(m)", "m = again(m)", "m = filed(m)", "checkpointed(m)"],
    "states": ["other = fresh(); other.load_state_dict(m.state_dict()); m = other", "m = m.double().float()"],
    "calls": ["with torch.inference_mode(): see(m(x))", "see(penalised(m, x))", "see(recomputed(m, x))"],
}


@pytest.mark.parametrize("config", ["off", "rates of 1", "rates", "signs", "split", "all"])
@pytest.mark.parametrize("name", FINE)
def test_what_acts_already_is_neither_different_nor_refused(name: str, config: str) -> None:
    assert run_again(Setup(1, "normed", config), FINE[name]).outcome == "equal"


def test_the_same_seed_is_the_same_trial() -> None:
    assert one(7) == one(7)


def test_a_result_that_does_not_follow_is_found_and_its_trial_made_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def keeps_its_slope(self: Setup, model: nn.Module, x: Tensor) -> nn.Module:
        copied: Any = copy.deepcopy(model)
        slope = copied[6].negative_slope
        copied[6].forward = lambda y: nn.functional.leaky_relu(y, slope)
        return copied  # type: ignore[no-any-return]

    monkeypatch.setattr(Setup, "transform", keeps_its_slope)
    setup = Setup(1, "normed", "off", recorded=True)
    changes = ["m.eval()", "at(m, '6').negative_slope = 0.5", "x = batch(2)"]
    verdict = run_again(setup, changes)
    assert verdict.outcome == "failed"
    assert verdict.message.startswith("computed differs: output: off by")
    found = made_smaller(setup, changes, verdict)
    assert found.changes == (changes[1],)
    assert not found.setup.recorded
    script = str(found)
    namespace: dict[str, Any] = {}
    exec(script.replace("print(", "verdict = ("), namespace)
    assert namespace["verdict"] == found.verdict


def test_a_foreign_exception_and_a_lost_factor_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = Setup.transform

    def without_factors(self: Setup, model: nn.Module, x: Tensor) -> Any:
        made = transform(self, model, x)
        for parameter in made.parameters():
            parameter.register_hook(lambda gradient: gradient * 1.01)
        return made

    monkeypatch.setattr(Setup, "transform", without_factors)
    verdict = run_again(Setup(1, "normed", "rates"), [])
    assert verdict.message.startswith("computed differs: gradient of")
    monkeypatch.setattr(Setup, "transform", lambda self, model, x: 1 / 0)
    assert run_again(Setup(1, "normed", "off"), []).message.startswith("transform raises a foreign ZeroDiv")
