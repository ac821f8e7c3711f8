"""Models that Python runs around their graphs: modules stay of their own classes, and no trace is left."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import biofx
from biofx import BioConfig

USER = '''
import torch
from torch import nn


class Block(nn.Module):
    """A region of several layers."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))


class Routed(nn.Module):
    """Decides by a value which way to go; one layer has two names."""

    def __init__(self):
        super().__init__()
        self.block, self.open = Block(), nn.Linear(6, 6)
        self.again, self.up = self.open, nn.ConvTranspose1d(6, 6, 1)
        self.shift = nn.Parameter(torch.ones(6))

    def forward(self, x):
        if x.mean() > 0:
            return self.block(x) + self.shift
        return self.up(self.again(torch.relu(self.open(x))).unsqueeze(-1)).squeeze(-1)


class Net(nn.Module):
    """One graph, but for a module in it."""

    def __init__(self):
        super().__init__()
        self.stem, self.routed, self.out = nn.Linear(4, 6), Routed(), nn.Linear(6, 2)

    def forward(self, x):
        return self.out(torch.relu(self.routed(torch.relu(self.stem(x)) - 0.3)))


class Deciding(Net):
    """No graph at all: the model itself decides."""

    def forward(self, x):
        return super().forward(x) if float(x.sum()) < 1e9 else x


class Careful(Net):
    """Python runs something that every exporter knows."""

    def __init__(self):
        super().__init__()
        self.routed = Trying()


class Trying(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        try:
            return self.block(x)
        except ValueError:
            return x
'''
PASSES = BioConfig(
    weight_splitting_Gamma=2,
    apply_dales_principle=True,
    dales_constrain_inputs=True,
    dales_constrain_readout=True,
    fuzzy_lr_distribution=biofx.Distribution.ACTIVITY,
    fuzzy_lr_dynamic=True,
)
CONFIGS = {
    "folded": PASSES,
    "function": PASSES.replace(weight_splitting_activation_function=torch.tanh),
    "module": PASSES.replace(weight_splitting_activation_function=nn.LeakyReLU(0.1)),
}


@pytest.fixture
def user(tmp_path: Path) -> Iterator[Any]:
    """A module of the user's, importable by name in other processes that start in the folder."""
    path = tmp_path / "user_nets.py"
    path.write_text(USER, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("user_nets", path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules["user_nets"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["user_nets"]


def trained(model: nn.Module, config: BioConfig) -> Any:
    bio_model, _ = biofx.transform(model, config)
    optimizer = torch.optim.SGD(bio_model.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad()
        bio_model(inputs(step)).square().mean().backward()
        optimizer.step()
    return bio_model.eval()


def inputs(step: int) -> Tensor:
    """Return a batch that goes one way through the model, or the other."""
    return torch.randn(8, 4).abs() * (3.0 if step % 2 else -3.0)


def names_of_biofx(model: nn.Module) -> list[str]:
    things: list[Any] = []
    for module in model.modules():
        things += [type(module), *map(type, vars(module).values())]
        things += [node.target for node in module.graph.nodes] if isinstance(module, GraphModule) else []
    found = [str(thing) for thing in things if str(getattr(thing, "__module__", "")).startswith("biofx")]
    return found + [key for key in model.state_dict() if "bio_mod" in key]


LOADED = """
import sys
sys.modules["biofx"] = None  # an import of it fails
import torch
model = torch.load(sys.argv[1], weights_only=False)
for x, expected in torch.load(sys.argv[2]):
    torch.testing.assert_close(model(x), expected)
assert not [name for name in sys.modules if name.startswith("biofx.")]
"""


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("name", ["Net", "Deciding"])
def test_modules_in_python_keep_their_classes_around_plain_graphs(name: str, kind: str, user: Any) -> None:
    bio_model = trained(getattr(user, name)(), CONFIGS[kind])
    assert bio_model.region_paths
    before = {key: value.clone() for key, value in bio_model.state_dict().items()}
    deployed: Any = biofx.deploy(bio_model)
    assert names_of_biofx(deployed) == []
    assert isinstance(deployed, GraphModule) == (name == "Net")
    assert type(deployed.routed) is user.Routed
    assert deployed.routed.again is deployed.routed.open
    assert isinstance(deployed.routed.block, GraphModule)
    ways = set()
    for step in range(6):
        x = inputs(step)
        expected = bio_model(x)
        torch.testing.assert_close(deployed(x), expected)
        ways.add(bool((torch.relu(bio_model.stem(x)) - 0.3).mean() > 0))
    assert not deployed.training
    for key, value in bio_model.state_dict().items():
        assert torch.equal(value, before[key])
    mine = {tensor.untyped_storage().data_ptr() for tensor in bio_model.state_dict().values()}
    assert not mine & {tensor.untyped_storage().data_ptr() for tensor in deployed.state_dict().values()}


@pytest.mark.parametrize("name", ["Net", "Deciding"])
def test_a_process_with_the_user_s_classes_and_without_biofx_runs_it(
    name: str, user: Any, tmp_path: Path
) -> None:
    bio_model = trained(getattr(user, name)(), CONFIGS["module"])
    files = [str(tmp_path / "model.pt"), str(tmp_path / "expected.pt")]
    torch.save(biofx.deploy(bio_model), files[0])
    torch.save([(x, bio_model(x).detach()) for x in map(inputs, range(4))], files[1])
    command = [sys.executable, "-W", "ignore", "-c", LOADED, *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_it_exports_where_python_does_what_can_be_exported(user: Any) -> None:
    bio_model = trained(user.Careful(), CONFIGS["folded"])
    assert "routed" in bio_model.graph_breaks
    deployed = biofx.deploy(bio_model)
    program = torch.export.export(deployed, (inputs(0),))
    assert "biofx" not in str(program)
    x = inputs(3)
    torch.testing.assert_close(program.module()(x), bio_model(x))


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_a_layer_s_graph_does_not_know_is_known_to_the_layer_or_refused(kind: str, user: Any) -> None:
    bio_model = trained(user.Net(), CONFIGS[kind])
    region, plain = bio_model.routed.up, biofx.deploy(bio_model).get_submodule("routed.up")
    x = torch.randn(3, 6, 4)
    torch.testing.assert_close(plain(x), region(x))
    with pytest.raises(biofx.errors.InputError, match="argument 'output_size'"):
        region(x, [4])
    if isinstance(plain, GraphModule):
        torch.testing.assert_close(plain(x, None), region(x))
        with pytest.raises(AssertionError, match="argument 'output_size': expected None"):
            plain(x, [4])
    else:
        assert type(plain) is nn.ConvTranspose1d
        torch.testing.assert_close(plain(x, [4]), region(x))


def test_a_class_that_is_not_known_is_refused(user: Any) -> None:
    bio_model = trained(user.Deciding(), CONFIGS["folded"])
    type(bio_model)._user_class = None
    with pytest.raises(biofx.CaptureError, match="Deciding has no forward but its graph's"):
        biofx.deploy(bio_model)
