"""Settings of normalisations and dropouts that change after the transform act as in the plain model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.optim.swa_utils import update_bn

import biofx

CONFIGS: dict[str, dict[str, Any]] = {
    "scaled": {},
    "signed": {"apply_dales_principle": True},
    "split": {"weight_splitting_Gamma": 2, "weight_splitting_fold": False},
    "folded": {"weight_splitting_Gamma": 2},
    "folded and signed": {"weight_splitting_Gamma": 2, "apply_dales_principle": True},
}
BATCHES = [torch.linspace(-1, 1, 64).reshape(16, 4) ** (n + 1) + n for n in range(5)]


def transformed(config: str, **options: Any) -> biofx.BioGraphModule:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(4, 8), nn.BatchNorm1d(8, **options), nn.ReLU()]
    layers += [nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)]
    return biofx.transform(nn.Sequential(*layers), CONFIGS[config]).graph_module


def graph_of(bio_model: Any) -> Graph:
    found: Graph = bio_model.graph
    return found


def layer_of(bio_model: nn.Module, path: str) -> Any:
    return bio_model.get_submodule(path)


def before_the_norm(bio_model: nn.Module, x: Tensor) -> Tensor:
    """What reaches the first normalisation: of the first layer, sums of neighbours where it is split."""
    layer: Any = bio_model.get_submodule("0")
    y: Tensor = x @ layer.weight.T + layer.bias
    if any("fold" in str(node.target) or "pool" in str(node.target) for node in graph_of(bio_model).nodes):
        y = y.unflatten(1, (4, 2)).sum(2, keepdim=True).expand(-1, -1, 2).flatten(1)
    return y.detach()


def statistics(bio_model: nn.Module) -> tuple[Tensor, Tensor, int]:
    norm = layer_of(bio_model, "1")
    return norm.running_mean.clone(), norm.running_var.clone(), int(norm.num_batches_tracked)


@pytest.mark.parametrize("config", CONFIGS)
def test_update_bn_gives_the_mean_of_all_batches(config: str) -> None:
    bio_model = transformed(config)
    bio_model(BATCHES[0])
    values = [before_the_norm(bio_model, x) for x in BATCHES]
    update_bn(BATCHES, bio_model)
    mean, variance, count = statistics(bio_model)
    torch.testing.assert_close(mean, torch.stack([v.mean(0) for v in values]).mean(0))
    torch.testing.assert_close(variance, torch.stack([v.var(0) for v in values]).mean(0))
    assert count == len(BATCHES)
    assert layer_of(bio_model, "1").momentum == 0.1


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 1.0, None])
def test_momentum_is_read_at_each_call(config: str, momentum: float | None) -> None:
    bio_model = transformed(config)
    bio_model(BATCHES[0])
    layer_of(bio_model, "1").momentum = momentum
    for x in BATCHES[1:3]:
        mean, variance, count = statistics(bio_model)
        value = before_the_norm(bio_model, x)
        share = 1 / (count + 1) if momentum is None else momentum
        bio_model(x)
        found = statistics(bio_model)
        torch.testing.assert_close(found[0], mean + share * (value.mean(0) - mean))
        torch.testing.assert_close(found[1], variance + share * (value.var(0) - variance))
        assert found[2] == count + 1
    for copied in (copy.deepcopy(bio_model).eval(), biofx.deploy(bio_model)):
        torch.testing.assert_close(copied(BATCHES[3]), bio_model.eval()(BATCHES[3]))


@pytest.mark.parametrize("config", CONFIGS)
def test_a_norm_made_to_take_the_mean_of_all_batches_does_so(config: str) -> None:
    bio_model = transformed(config, momentum=None)
    values = [before_the_norm(bio_model, x) for x in BATCHES]
    for x in BATCHES:
        bio_model(x)
    torch.testing.assert_close(statistics(bio_model)[0], torch.stack([v.mean(0) for v in values]).mean(0))


@pytest.mark.parametrize("config", CONFIGS)
def test_statistics_that_are_not_tracked_stay_and_the_batch_counts_in_training(config: str) -> None:
    bio_model = transformed(config)
    bio_model(BATCHES[0])
    reference = copy.deepcopy(bio_model)
    layer_of(bio_model, "1").track_running_stats = False
    before = statistics(bio_model)
    torch.testing.assert_close(bio_model(BATCHES[1]), reference(BATCHES[1]))
    after = statistics(bio_model)
    torch.testing.assert_close(after[:2], before[:2], rtol=0, atol=0)
    assert after[2] == before[2]


@pytest.mark.parametrize("config", CONFIGS)
def test_without_statistics_every_batch_is_normalised_by_itself(config: str) -> None:
    bio_model = transformed(config)
    expected = bio_model(BATCHES[0])
    for path in ("1", "4"):
        norm = layer_of(bio_model, path)
        norm.running_mean = norm.running_var = None
    torch.testing.assert_close(bio_model.eval()(BATCHES[0]), expected)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("training", [False, True])
def test_epsilon_is_read_at_each_call(config: str, training: bool) -> None:
    bio_model = transformed(config).train(training)
    layer_of(bio_model, "1").eps = 0.7
    value = before_the_norm(bio_model, BATCHES[1])
    mean, variance = (value.mean(0), value.var(0, unbiased=False)) if training else statistics(bio_model)[:2]
    seen: list[Tensor] = []
    for _, module in bio_model.named_modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    bio_model(BATCHES[1])
    expected = (value - mean) / (variance + 0.7).sqrt()
    found = seen[0]
    if found.shape != expected.shape:  # one value for each connection
        expected = expected[:, ::2]
    torch.testing.assert_close(found, expected)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.GRU(4, 4, 2, batch_first=True)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        x, _ = self.recurrent(x)
        return self.attention(x, x, x)[0]


@pytest.mark.parametrize("path", ["recurrent", "attention"])
def test_dropout_of_recurrent_layers_and_attention_is_read_at_each_call(path: str) -> None:
    torch.manual_seed(0)
    plain = Sequence()
    bio_model, _ = biofx.transform(plain)
    x = torch.linspace(-1, 1, 40).reshape(2, 5, 4)
    without = bio_model(x)
    for model in (plain, bio_model):
        layer_of(model, path).dropout = 0.5
    torch.manual_seed(2)
    expected = plain(x)
    torch.manual_seed(2)
    found = bio_model(x)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, without)
    torch.testing.assert_close(biofx.deploy(bio_model)(x), plain.eval()(x))


def test_dropout_of_expanded_units_follows_its_schedule() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    bio_model, _ = biofx.transform(model, {"apply_dales_principle": True, "dales_method": "expand"})
    layer_of(bio_model, "2").p = 1.0
    layers = [layer_of(bio_model, path) for path in ("3", "5")]
    expected = bio_model(torch.ones(1, 4)), bio_model(-torch.ones(1, 4))
    assert layers[0].in_features == 16
    torch.testing.assert_close(expected[0], expected[1], rtol=0, atol=0)
