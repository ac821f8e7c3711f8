from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize
from torch import Tensor, nn

import biofx
from biofx import BioGraphModule

CONFIG = biofx.BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True)


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def double_all(module: nn.Module, args: Any, output: dict[str, Any]) -> dict[str, Any]:
    return output | {"out": output["out"] * 2}


class Model(nn.Module):
    """A model with everything that a plain graph module drops, for ``(batch, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.last = nn.Linear(4, 2)
        self.first = nn.Linear(4, 4)
        tied = nn.Linear(4, 4)
        tied.weight = self.first.weight
        self.blocks = nn.ModuleList([tied, nn.BatchNorm1d(4)])
        self.register_buffer("scale", torch.ones(4), persistent=False)
        self.names = ["a", "b"]
        self.register_forward_hook(double_all)
        self.first.register_forward_hook(double)

    def forward(self, x: Tensor) -> Any:
        y = torch.relu(self.first(x) * self.scale)
        y = nn.functional.dropout(y, 0.1, self.training)
        return {"out": self.last(self.blocks[1](self.blocks[0](y))), "parts": (y[:, :2], [y])}


def through_pickle(model: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, through_pickle, through_torch]


@pytest.fixture
def bio_model() -> BioGraphModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return biofx.transform(Model(), CONFIG).graph_module


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_computes_the_same_and_is_independent(
    copied: Callable[[nn.Module], Any], bio_model: BioGraphModule, vectors: Tensor
) -> None:
    other = copied(bio_model)
    for training in (True, False):
        torch.manual_seed(0)
        expected = bio_model.train(training)(vectors)
        torch.manual_seed(0)
        torch.testing.assert_close(other.train(training)(vectors), expected, rtol=0, atol=0)
    before = {name: value.clone() for name, value in bio_model.state_dict().items()}
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            tensor.zero_()
    for name, value in bio_model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("copied", [*COPIES, copy.copy])
def test_a_copy_keeps_names_keys_order_hooks_attributes_and_ties(
    copied: Callable[[nn.Module], Any], bio_model: BioGraphModule
) -> None:
    other = copied(bio_model)
    assert isinstance(other, BioGraphModule)
    assert type(other).__name__ == "Model"
    assert biofx.format_graph(other) == biofx.format_graph(bio_model)
    assert [node.name for node in other.graph.nodes] == [node.name for node in bio_model.graph.nodes]
    assert list(other.state_dict()) == list(bio_model.state_dict())
    assert [name for name, _ in other.named_parameters()] == [
        name for name, _ in bio_model.named_parameters()
    ]
    assert "scale" in dict(other.named_buffers())
    assert "scale" not in other.state_dict()
    assert other.names == ["a", "b"]
    assert list(other._forward_hooks.values()) == [double_all]
    assert list(other.first._forward_hooks.values()) == [double]
    assert other.first.weight is other.blocks[0].weight
    assert isinstance(other.unused, nn.Linear)


def test_a_shallow_copy_shares_tensors_but_not_the_graph(bio_model: BioGraphModule) -> None:
    other = copy.copy(bio_model)
    assert other.last.weight is bio_model.last.weight
    assert other.graph is not bio_model.graph


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_of_a_copy_can_be_rewritten(copied: Callable[[nn.Module], Any], mlp: nn.Module) -> None:
    other = copied(copied(biofx.capture(mlp)))
    found = biofx.transform(other, CONFIG)
    expected = biofx.transform(mlp, CONFIG)
    assert biofx.format_graph(found.graph_module) == biofx.format_graph(expected.graph_module)
    assert [str(remark) for remark in found.report.remarks] == [
        str(remark) for remark in expected.report.remarks
    ]


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_knows_which_module_call_a_node_belongs_to(
    copied: Callable[[nn.Module], Any], mlp: nn.Module
) -> None:
    model = nn.Sequential(mlp[0], nn.ReLU(), nn.Linear(6, 4), mlp[0])  # type: ignore[index]
    other = copied(biofx.capture(model))
    assert biofx.transform(other, CONFIG, only="0#1").report.modified


@pytest.mark.parametrize("copied", COPIES)
def test_a_graph_of_thousands_of_nodes_can_be_copied(copied: Callable[[nn.Module], Any]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), *(nn.Tanh() for _ in range(3000)))
    captured = biofx.capture(model)
    other = copied(captured)
    assert len(other.graph.nodes) == 3003
    x = torch.ones(1, 2)
    assert torch.equal(other(x), model(x))


def test_slices_and_named_tuples_survive_pickling(vectors: Tensor) -> None:
    class Slices(nn.Module):
        def forward(self, x: Tensor) -> Any:
            n = x.shape[0] - 1
            best = torch.max(x[:n, 1:3:2], 0)
            return {"value": best.values, "where": best.indices, "rest": x[..., None, :n]}

    model = Slices()
    other = through_pickle(biofx.capture(model))
    torch.testing.assert_close(other(vectors), model(vectors), rtol=0, atol=0)


def test_what_cannot_be_copied_is_an_input_error(mlp: nn.Module) -> None:
    captured = biofx.capture(mlp)
    vars(captured)["late"] = [captured.get_parameter("0.weight") * 2]
    with pytest.raises(biofx.errors.InputError, match="can be copied"):
        copy.deepcopy(captured)


def test_methods_that_make_another_of_their_kind_make_a_plain_one_of_the_same_modules() -> None:
    bio_model, _ = biofx.transform(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    made: Any = bio_model
    part = made[:2]
    assert type(part) is nn.Sequential
    assert [id(layer) for layer in part] == [id(made[0]), id(made[1])]
    assert len(made[3:]) == 0
    assert [*(made + nn.Sequential(nn.Tanh()))][:3] == [*made]


class Halved(nn.Module):
    def forward(self, weight: Any) -> Any:
        return weight / 2


class DecidesByAValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Any) -> Any:
        return self.fc(x) if x.sum() < 1e9 else x


def test_a_shallow_copy_with_a_parametrized_region_runs() -> None:
    bio_model, _ = biofx.transform(DecidesByAValue(), {"fuzzy_learning_rate_factor_nu": 0.4})
    torch.nn.utils.parametrize.register_parametrization(bio_model.get_submodule("fc"), "weight", Halved())
    x = torch.randn(4, 3)
    expected = bio_model(x)
    assert torch.equal(copy.copy(bio_model)(x), expected)
