"""Activations as text and back."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.callables import (
    ELEMENTWISE,
    callable_from_text,
    callable_to_text,
    check_activation,
    identity,
    register_activation,
)
from biofx.cli import main
from biofx.errors import BiofxError, OptionError


def doubled(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (identity, "identity"),
        (torch.tanh, "torch.tanh"),
        (torch.relu, "torch.relu"),
        (F.relu, "torch.nn.functional.relu"),
        (F.gelu, "torch.nn.functional.gelu"),
        (torch.special.expit, "torch.special.expit"),
    ],
)
def test_a_function_of_torch_comes_back_as_itself(function: Callable[..., Any], text: str) -> None:
    assert callable_to_text(function) == text
    assert callable_from_text(text) is function


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.ELU(), nn.Softplus()])
def test_an_option_free_module_comes_back_as_an_instance_of_its_class(module: nn.Module) -> None:
    text = callable_to_text(module)
    assert text == f"torch.nn.{type(module).__name__}"
    assert type(callable_from_text(text)) is type(module)


def test_the_identity_module_is_the_identity() -> None:
    assert callable_from_text(callable_to_text(nn.Identity())) is identity


class OwnActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    "function",
    [
        doubled,
        lambda x: x,
        functools.partial(F.leaky_relu, negative_slope=0.2),
        nn.ReLU(inplace=True),
        nn.GELU("tanh"),
        nn.ELU(0.5),
        nn.Softmax(-1),
        nn.Dropout(),
        torch.softmax,
        F.normalize,
        F.dropout,
        torch.relu_,
        torch.manual_seed,
        torch.nn.Linear(2, 2),
        nn.PReLU(),
        nn.Sequential(nn.ReLU()),
        OwnActivation(),
        os.system,
        abs,
    ],
)
def test_what_torch_has_no_name_for_has_no_text(function: Callable[..., Any]) -> None:
    with pytest.raises(
        OptionError,
        match=r"(?s)expected a callable that a text can name .* register it, or keep it in Python",
    ):
        callable_to_text(function)


HOSTILE = [
    "import:os:system",
    "import:not_imported_module:x",
    "os.system",
    "builtins.exec",
    "torch.os.system",
    "torch._C",
    "torch._dynamo",
    "torch.onnx",
    "torch.nn.__class__",
    "torch.nn.functional.torch.tanh",
    "torch.Tensor",
    "torch.nn",
    "torch.",
    ".tanh",
    "tanh",
    "",
    "torch.tanh()",
    "torch.set_default_device",
    "torch.manual_seed",
    "torch.load",
    "torch.from_file",
    "torch.compile",
    "torch.use_deterministic_algorithms",
    "torch.nn.functional.dropout",
    "torch.nn.functional.normalize",
    "torch.nn.functional.relu_",
    "torch.nn.functional.rrelu",
    "torch.softmax",
    "torch.cumsum",
    "torch.nn.Linear",
    "torch.nn.Dropout",
    "torch.nn.Softmax",
    "torch.nn.RReLU",
    "torch.nn.DataParallel",
    "torch.special.softmax",
    "torch.linalg.inv",
    "torch.hub.load",
    "numpy.tanh",
    "math.tanh",
    "os.path.join",
    "tests.doubled",
    "__main__.f",
    "torch.tanh ",
    "torch.nn.functional.relu\n",
    "TORCH.TANH",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_that_names_no_activation_is_refused_and_imports_nothing(text: str) -> None:
    before = set(sys.modules)
    with pytest.raises(OptionError) as caught:
        callable_from_text(text)
    assert f"found {text!r}" in str(caught.value)
    assert set(sys.modules) == before


def test_a_misspelt_activation_names_the_nearest() -> None:
    with pytest.raises(OptionError, match="did you mean 'tanh'"):
        callable_from_text("torch.tanhh")


NAMES = [f"{place}.{name}" for place, (_, names) in ELEMENTWISE.items() for name in sorted(names)]


@pytest.mark.parametrize("text", ["identity", *NAMES])
def test_what_a_text_may_name_does_the_same_to_each_element_and_nothing_else(text: str) -> None:
    function = callable_from_text(text)
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(6, 8, 10, generator=draw) * 1.5 - 0.5
    before, state = x.clone(), torch.get_rng_state()
    y = function(x)
    assert isinstance(y, Tensor)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    order = torch.randperm(8, generator=draw)
    same: Callable[..., None] = functools.partial(torch.testing.assert_close, equal_nan=True)
    same(function(x), y, rtol=0, atol=0)
    same(function(x[:, order]), y[:, order])
    same(function(x[2:3, ::2, 5]), y[2:3, ::2, 5])
    same(function(x.permute(2, 0, 1)), y.permute(2, 0, 1))
    same(function(x.reshape(-1)), y.reshape(-1))
    same(torch.stack([function(value) for value in x[0, 0]]), y[0, 0])
    same(function(torch.cat([x, 3 * x]))[:6], y)
    leaf = x[:1].clone().requires_grad_()
    function(leaf).sum().backward()  # it can be trained through
    assert leaf.grad is not None


@pytest.mark.parametrize(
    "text", [name for name in NAMES if name not in ("torch.nn.PReLU", "torch.nn.Identity")]
)
def test_what_a_text_may_name_has_that_name_itself(text: str) -> None:
    found = callable_from_text(text)
    again = callable_from_text(callable_to_text(found))
    assert again is found or type(again) is type(found)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered here is forgotten afterwards."""
    monkeypatch.setattr("biofx.callables._registered", {})


def twice(x: Tensor) -> Tensor:
    return torch.tanh(2 * x)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def test_what_is_registered_can_be_named_everywhere(
    own: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    biofx.register_activation("my-twice", twice)
    biofx.register_activation("my-twice", twice)
    assert callable_to_text(twice) == "my-twice"
    pipeline = biofx.Pipeline.parse("split-weights{gamma=2,activation=my-twice}")
    assert str(pipeline) == "split-weights{activation=my-twice}"
    x = torch.randn(3, 4)
    config = biofx.BioConfig(weight_splitting_Gamma=2, weight_splitting_activation_function="my-twice")  # type: ignore[arg-type]
    assert config.weight_splitting_activation_function is twice
    config.to_toml(tmp_path / "c.toml")
    assert biofx.BioConfig.from_toml(tmp_path / "c.toml") == config
    torch.manual_seed(0)
    model, _ = biofx.transform(net(), config)
    biofx.save(model, tmp_path / "a.pt")
    loaded = biofx.load(tmp_path / "a.pt", net())
    assert torch.equal(loaded(x), model(x))
    monkeypatch.setattr("biofx.callables._registered", {})
    with pytest.raises(
        biofx.errors.CheckpointError, match=r"found 'my-twice'; a text can name .*register_activation"
    ):
        biofx.load(tmp_path / "a.pt", net())
    with pytest.raises(OptionError, match=r"c.toml: .*found 'my-twice'"):
        biofx.BioConfig.from_toml(tmp_path / "c.toml")
    # given as an object, it is the same
    again, _ = biofx.transform(
        net(), {"weight_splitting_Gamma": 2, "weight_splitting_activation_function": twice}
    )
    assert torch.equal(biofx.load(tmp_path / "a.pt", again)(x), model(x))


def test_a_name_means_one_thing(own: None) -> None:
    register_activation("f", twice)
    with pytest.raises(OptionError, match="expected a free name, found 'f', which means <function twice"):
        register_activation("f", doubled)
    with pytest.raises(OptionError, match="expected a free name"):
        register_activation("f", lambda x: x)
    namespace: dict[str, Any] = {"__name__": __name__}
    exec("def twice(x): return x", namespace)  # a cell of a notebook that runs again
    register_activation("f", namespace["twice"])
    assert callable_from_text("f") is namespace["twice"]
    for name in (
        "identity",
        "torch.mine",
        "torch",
        "none",
        "true",
        "",
        "a b",
        "1.5",
        "-x",
        "a,b",
        "a{",
        3,
        None,
    ):
        with pytest.raises(OptionError, match="expected a name of letters, digits"):
            register_activation(name, twice)  # type: ignore[arg-type]
    for value in (3, nn.ReLU, "torch.tanh", None):
        with pytest.raises(OptionError, match="g: expected a callable"):
            register_activation("g", value)  # type: ignore[arg-type]


DOORS: dict[str, Callable[[str, Path], object]] = {
    "a pipeline's text": lambda name, _: biofx.transform(net(), passes=f"split-weights{{activation={name}}}"),
    "a quoted text": lambda name, _: biofx.Pipeline.parse(f'split-weights{{activation="{name}"}}'),
    "an override": lambda name, _: biofx.transform(
        net(), passes=f'split-weights{{@"0"{{activation={name}}}}}'
    ),
    "a config": lambda name, _: biofx.BioConfig.from_dict({ACTIVATION: name}),
    "a config's override": lambda name, _: biofx.BioConfig.from_dict(
        {"overrides": [{"selector": "0", ACTIVATION: name}]}
    ),
    "a file": lambda name, folder: biofx.BioConfig.from_toml(written(folder, name)),
    "a keyword": lambda name, _: biofx.BioConverter({ACTIVATION: name}),
    "a checkpoint": lambda name, folder: biofx.load(checkpoint(folder, name), net()),
}
ACTIVATION = "weight_splitting_activation_function"


def written(folder: Path, name: str) -> Path:
    (folder / "c.toml").write_text(f"{ACTIVATION} = {json.dumps(name)}\n", encoding="utf-8")
    return folder / "c.toml"


def checkpoint(folder: Path, name: str) -> Path:
    biofx.save(
        biofx.transform(net(), passes="split-weights{activation=torch.tanh}").graph_module, folder / "a.pt"
    )
    content = torch.load(folder / "a.pt", weights_only=True)
    assert content["record"].count('"torch.tanh"') == 1
    content["record"] = content["record"].replace('"torch.tanh"', json.dumps(name))
    torch.save(content, folder / "a.pt")
    return folder / "a.pt"


@pytest.mark.parametrize(
    "name", ["torch.set_default_device", "os.system", "torch.nn.functional.dropout", "torch.load"]
)
@pytest.mark.parametrize("door", DOORS)
def test_no_text_names_anything_else(door: str, name: str, tmp_path: Path) -> None:
    before = set(sys.modules)
    with pytest.raises(BiofxError, match="expected an activation such as"):
        DOORS[door](name, tmp_path)
    assert door == "a checkpoint" or set(sys.modules) == before  # torch.load imports of its own
    assert nn.Linear(2, 2)(torch.ones(1, 2)).device.type == "cpu"


def test_the_command_line_names_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text("from torch import nn\nnet = nn.Linear(4, 2)\n", encoding="utf-8")
    arguments = ["transform", "nets.py:net", "--set"]
    assert main([*arguments, f"{ACTIVATION}=torch.tanh"]) == 0
    capsys.readouterr()
    assert main([*arguments, f"{ACTIVATION}=torch.manual_seed"]) == 1
    assert "found 'torch.manual_seed'; a text can name element-wise functions" in capsys.readouterr().err
    sys.modules.pop("nets", None)


def test_a_checkpoint_that_named_what_no_text_names_any_more_loads_into_a_model_made_alike(
    tmp_path: Path,
) -> None:
    options = {"weight_splitting_Gamma": 2, ACTIVATION: F.normalize}
    model, _ = biofx.transform(net(), options)
    biofx.save(model, tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    named = content["record"].replace(
        '{"unnamed": "normalize"}', '{"callable": "torch.nn.functional.normalize"}'
    )
    assert named != content["record"]  # as older versions wrote it
    torch.save({**content, "record": named}, tmp_path / "a.pt")
    with pytest.raises(
        biofx.errors.CheckpointError, match=r"found 'torch.nn.functional.normalize'.*load into the result"
    ):
        biofx.load(tmp_path / "a.pt", net())
    again, _ = biofx.transform(net(), options)
    biofx.load(tmp_path / "a.pt", again)
    assert torch.equal(again.get_parameter("0.weight"), model.get_parameter("0.weight"))
    other, _ = biofx.transform(net(), {**options, ACTIVATION: F.softmax})
    with pytest.raises(biofx.errors.CheckpointError, match="Transform it with the same options"):
        biofx.load(tmp_path / "a.pt", other)


def test_a_reproducer_knows_what_was_registered(own: None, tmp_path: Path) -> None:
    from biofx.rewriting.reproducer import write_reproducer

    register_activation("my-twice", twice)
    passes = biofx.Pipeline.parse("split-weights{gamma=2,activation=my-twice}").passes
    script = write_reproducer(tmp_path / "out", biofx.capture(net()), passes, "story")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 groups of 2 of its 4 output channels summed after twice" in done.stdout


def test_an_activation_may_be_given_as_a_callable_or_as_text() -> None:
    assert check_activation("phi", doubled) is doubled
    assert check_activation("phi", "torch.tanh") is torch.tanh


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "phi: expected a callable from tensor to tensor, found 3"),
        (nn.ReLU, r"phi: .* found the class ReLU; create an instance: ReLU\(\)"),
        ("torch.tanhh", "phi: expected an activation .* found 'torch.tanhh'"),
    ],
)
def test_a_bad_activation_is_refused_under_the_name_of_its_option(value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        check_activation("phi", value)
