"""Random models through everything, from transform to deploy; and files that are not what they seem.

Short by default; ``python tools/fuzz.py 10`` goes on for ten minutes with other numbers.
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

EXAMPLES = int(os.environ.get("BIOFX_FUZZ_EXAMPLES", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 8,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
CONVOLUTIONS = {
    1: (nn.Conv1d, nn.ConvTranspose1d),
    2: (nn.Conv2d, nn.ConvTranspose2d),
    3: (nn.Conv3d, nn.ConvTranspose3d),
}
NORMS = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
NAMES = ("stem", "größe", "it's", "a b", "[bold]red[/]", "x" * 60, "/etc/passwd", "{0}", "%s", "$HOME")


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return x + self.inner(x)


class Concatenate(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Any:
        return torch.cat([part(x) for part in self.parts], 1)


class Shared(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(torch.relu(self.layer(x)))


class Weights(nn.Module):
    """Weights without a layer, dropout without a module, a buffer that is not saved."""

    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(width, width))
        self.register_buffer("scale", torch.rand(()), persistent=False)

    def forward(self, x: Tensor) -> Any:
        mixed = nn.functional.linear(x.movedim(1, -1), self.raw).movedim(-1, 1)
        return nn.functional.dropout(mixed, 0.2, self.training) * self.scale


class Sequence(nn.Module):
    """A recurrent layer, or attention, along the last axis; of units alone, over sequences of one."""

    def __init__(self, inner: nn.Module, *, alone: bool) -> None:
        super().__init__()
        self.inner = inner
        self.alone = alone

    def forward(self, x: Tensor) -> Any:
        steps = x.unsqueeze(1) if self.alone else x.transpose(1, 2)
        attends = isinstance(self.inner, nn.MultiheadAttention)
        y = self.inner(steps, steps, steps)[0] if attends else self.inner(steps)[0]
        return y.squeeze(1) if self.alone else y.transpose(1, 2)


def normalisations(axes: int, width: int) -> dict[str, Callable[[], nn.Module]]:
    """Those for units of a shape, by name."""
    instance: Any = (None, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[axes]
    made: dict[str, Callable[[], nn.Module]] = {
        "batch": lambda: NORMS[axes](width),
        "layer": lambda: nn.LayerNorm([width, *[3] * axes]),
        "rms": lambda: nn.RMSNorm([width, *[3] * axes]),
        "group": lambda: nn.GroupNorm(width, width) if axes else nn.Identity(),
    }
    return {**made, "instance": lambda: instance(width, affine=True)} if axes else made


@st.composite
def models(draw: Callable[[Any], Any]) -> tuple[nn.Module, Tensor]:
    """A nest of blocks over units of shape ``(batch, units, *)``, and an input."""
    axes = draw(st.integers(0, 3))
    width = first = draw(st.integers(1, 7))
    torch.manual_seed(draw(st.integers(0, 2**16)))

    def layer(into: int, out: int) -> nn.Module:
        bias = draw(st.booleans())
        if axes == 0:
            return nn.Linear(into, out, bias=bias)
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if into % g == 0 and out % g == 0]))
        kind: Any = draw(st.sampled_from(CONVOLUTIONS[axes]))
        made: nn.Module = kind(into, out, 3, padding=1, groups=groups, bias=bias)
        return made

    def block(width: int, depth: int) -> tuple[nn.Module, int]:
        kinds = ["layer", "shared", "weights", "relu", "norm", "dropout", "gelu"]
        kinds += ["recurrent", "attention"] * (axes < 2)
        kind = draw(st.sampled_from(kinds + ["residual", "concatenate", "nested"] * (depth < 2)))
        out, norms = draw(st.integers(1, 7)), normalisations(axes, width)
        if kind == "layer":
            return layer(width, out), out
        if kind == "shared":
            return Shared(layer(width, width)), width
        if kind == "residual":
            inner, inside = block(width, depth + 1)
            return Residual(nn.Sequential(inner, nn.ReLU(), layer(inside, width))), width
        if kind == "concatenate":
            left, right = block(width, depth + 1), block(width, depth + 1)
            return Concatenate(left[0], right[0]), left[1] + right[1]
        if kind == "nested":
            blocks, width = chain(width, depth + 1)
            return blocks, width
        if kind == "recurrent":
            cell: Any = draw(st.sampled_from([nn.GRU, nn.LSTM, nn.RNN]))
            both = draw(st.booleans())
            return Sequence(cell(width, out, batch_first=True, bidirectional=both), alone=axes == 0), out * (
                1 + both
            )
        simple: dict[str, Callable[[], nn.Module]] = {
            "weights": lambda: Weights(width),
            "relu": nn.ReLU,
            "norm": lambda: norms[draw(st.sampled_from(sorted(norms)))](),
            "attention": lambda: Sequence(nn.MultiheadAttention(width, 1, batch_first=True), alone=axes == 0),
            "dropout": lambda: nn.Dropout(0.3),
            "gelu": nn.GELU,
        }
        return simple[kind](), width

    def chain(width: int, depth: int) -> tuple[nn.Sequential, int]:
        blocks = nn.Sequential()
        names = draw(st.permutations(NAMES))
        for number in range(draw(st.integers(1, 4))):
            made, width = block(width, depth)
            blocks.add_module(f"{names[number]}{number}", made)
        return blocks, width

    model, width = chain(first, 0)
    model.add_module("readout", layer(width, draw(st.integers(1, 4))))
    return model, torch.randn(4, first, *[3] * axes)


CONFIGS = st.fixed_dictionaries(
    {
        "weight_splitting_Gamma": st.sampled_from([0, 2, 3]),
        "weight_splitting_activation_function": st.sampled_from(["identity", "torch.tanh", "torch.nn.ReLU"]),
        "apply_dales_principle": st.booleans(),
        "weight_splitting_fold": st.booleans(),
        "dales_method": st.sampled_from(["project", "abs", "expand"]),
        "dales_initialisation": st.sampled_from(["balanced", "keep"]),
        "dales_axis": st.sampled_from(["presynaptic", "postsynaptic"]),
        "dales_constrain_inputs": st.booleans(),
        "dales_constrain_readout": st.booleans(),
        "fuzzy_lr_distribution": st.sampled_from([member.value for member in biofx.Distribution]),
        "fuzzy_lr_granularity": st.sampled_from(["element", "neuron", "layer"]),
        "fuzzy_lr_dynamic": st.booleans(),
        "fuzzy_lr_update_freq": st.sampled_from([1, 2]),
        "seed": st.integers(0, 3),
    }
)
RULES = ["crystallize", "volume_dependent_lr", "synaptic_scaling", "update_fuzzy_learning_rates"]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
}


def attached(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Attach whatever rules have something to act on."""
    rules: list[Rule | str] = [Rule("rejuvenate_weights", every=2)]
    for name in RULES:
        if any(
            state.why_never(name) is None
            for state in model.modules()
            if isinstance(state, biofx.BioModule) and state.is_linked
        ):
            rules.append(name)
    return biofx.attach(model, optimizer, rules)


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
@given(models(), CONFIGS, st.booleans(), st.sampled_from(sorted(OPTIMIZERS)))
def test_a_random_model_goes_through_everything(
    given_model: tuple[nn.Module, Tensor], options: dict[str, Any], converts: bool, optimizer_name: str
) -> None:
    model, x = given_model
    before = copy.deepcopy(model.state_dict())
    config = biofx.BioConfig.from_dict(options)
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
    train(bio_model, optimizer, x, 3)
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
        with pytest.raises(biofx.CheckpointError, match="whose units became"):
            biofx.plain_state(bio_model)
    else:
        plain.load_state_dict(biofx.plain_state(bio_model))


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
        except biofx.CheckpointError as error:
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
