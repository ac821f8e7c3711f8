from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import biofx
from biofx.errors import OptionError, PlasticityError
from biofx.operators.rate_ops import GRADIENT_SCALINGS, sampling_of, scale_gradient_by_seed
from biofx.operators.rate_sampling import CHANGING, INDEPENDENT, rate_sampling
from biofx.plasticity.bio_module import BioModule

SEED = {"fuzzy_lr_dtype": "seed"}
OPTIONS: dict[str, Any] = {
    "distribution": "uniform",
    "nu": 0.4,
    "low": 0.5,
    "high": 2.0,
    "seed": 3,
    "path": "fc.weight",
}


def state(model: nn.Module, layer: str = "0") -> BioModule:
    found = model.get_submodule(f"{layer}.bio_mod")
    assert isinstance(found, BioModule)
    return found


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def factors(shape: tuple[int, ...]) -> Tensor:
    return rate_sampling(**OPTIONS).factors(torch.Size(shape), torch.device("cpu"))


@pytest.mark.parametrize("granularity", ["element", "neuron", "layer"])
@pytest.mark.parametrize("distribution", [d for d in INDEPENDENT if d.value != "baseline"])
def test_gradients_are_those_of_stored_rates_to_the_bit(
    distribution: biofx.Distribution, granularity: str
) -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3), nn.Flatten(), nn.Linear(384, 2))
    )
    config = biofx.BioConfig(
        fuzzy_lr_distribution=distribution,
        fuzzy_learning_rate_factor_nu=0.4,
        fuzzy_lr_granularity=granularity,
        apply_dales_principle=True,
    ).override("4", fuzzy_learning_rate_factor_nu=0.2)
    drawn = biofx.transform(model, config.replace(fuzzy_lr_dtype="seed")).graph_module
    stored = biofx.transform(model, config).graph_module
    x, before = torch.randn(4, 3, 8, 8), torch.get_rng_state()
    expected = gradients(stored, x)
    for _ in range(2):
        found = gradients(drawn, x)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name
    assert torch.equal(torch.get_rng_state(), before)
    assert biofx.check(drawn).ok
    for layer in ("0", "2", "4"):
        rates = state(drawn, layer).fuzzy_learning_rate_parameters
        assert torch.equal(rates, state(stored, layer).fuzzy_learning_rate_parameters)  # type: ignore[arg-type]


def test_a_large_weight_in_several_blocks_and_the_converter_agree() -> None:
    model, x = nn.Sequential(nn.Linear(600, 1000), nn.ReLU(), nn.Linear(1000, 2)), torch.randn(3, 600)
    stored = gradients(biofx.transform(model).graph_module, x)
    drawn = gradients(biofx.transform(model, SEED).graph_module, x)
    converted = biofx.BioConverter(SEED)(model)
    gradients(converted, x)
    assert converted.fuzzy_learning_rates()["0.weight"] == 600_000
    for name, gradient in stored.items():
        assert torch.equal(drawn[name], gradient)
        assert torch.equal(converted.get_parameter(name).grad, gradient)


def test_nothing_of_the_size_of_a_weight_is_kept(mlp: nn.Module) -> None:
    bio = biofx.transform(mlp, SEED).graph_module
    kept = {name: buffer.numel() for name, buffer in bio.named_buffers()}
    assert kept == {f"{layer}.bio_mod.fuzzy_learning_rate_draw": 8 for layer in (0, 2, 4)}


def test_the_graph_and_the_report_name_the_draw(mlp: nn.Module) -> None:
    bio, report = biofx.transform(mlp, {**SEED, "fuzzy_lr_granularity": "neuron", "seed": 5})
    assert (
        "_2_scaled = scale_gradient_by_seed(_2_weight, distribution='uniform', nu=0.16, low=0.5, high=2.0, "
        "seed=5, path='2.weight', granularity='neuron')"
    ) in biofx.format_graph(bio)
    message = report.passes[0].remarks[1].message
    assert message.startswith("4 factors drawn from their seed at each backward, uniform, mean ")
    nodes = [node for node in bio.graph.nodes if node.target in GRADIENT_SCALINGS]
    assert [sampling_of(node) for node in nodes] == [
        state(bio, layer).rate_sampling for layer in ("0", "2", "4")
    ]


def test_a_model_on_the_meta_device_knows_its_draws_and_takes_them_back(mlp: nn.Module) -> None:
    bio = biofx.transform(mlp, SEED).graph_module
    before, drawn = state(bio).fuzzy_learning_rate_parameters, state(bio).rate_sampling
    bio.to("meta")
    assert state(bio).rate_sampling == drawn
    assert state(bio).fuzzy_learning_rate_parameters.is_meta  # type: ignore[union-attr]
    bio.to_empty(device="cpu")
    assert torch.equal(state(bio).fuzzy_learning_rate_parameters, before)  # type: ignore[arg-type]


def test_a_draw_that_is_not_the_layers_own_is_found(mlp: nn.Module) -> None:
    bio = biofx.transform(mlp, SEED).graph_module
    node = next(node for node in bio.graph.nodes if node.target is scale_gradient_by_seed)
    node.kwargs = {**node.kwargs, "seed": 1}
    bio.recompile()
    (fault,) = biofx.check(bio).faults
    assert (fault.layer, fault.invariant) == ("0", "scaling")
    assert "'_0_scaled' draws other factors" in fault.message


@pytest.mark.parametrize("distribution", CHANGING)
def test_factors_that_depend_on_more_than_the_seed_are_refused(distribution: biofx.Distribution) -> None:
    with pytest.raises(OptionError, match=r"fuzzy_lr_dtype: expected 'float32' .* found 'seed'.*store them"):
        biofx.BioConfig(fuzzy_lr_dtype="seed", fuzzy_lr_distribution=distribution)
    with pytest.raises(OptionError, match="scale-gradients: dtype: expected 'float32'"):
        biofx.passes.ScaleGradients(dtype="seed", distribution=distribution)


def test_rules_that_would_change_them_are_refused(mlp: nn.Module, vectors: Tensor) -> None:
    converted = biofx.BioConverter(SEED)(mlp)
    gradients(converted, vectors)
    with pytest.raises(PlasticityError, match="sampled from their seed"):
        converted.crystallize()
    bio = biofx.transform(mlp, SEED).graph_module
    with pytest.raises(PlasticityError, match=r"crystallize has nothing to act on .*'float32'"):
        biofx.attach(bio, torch.optim.SGD(bio.parameters(), lr=0.1), ["crystallize"])


def test_a_graph_goes_on_drawing_what_it_says(mlp: nn.Module) -> None:
    bio = biofx.transform(mlp, SEED).graph_module
    state(bio).draw()
    state(bio).config = state(bio).config.replace(seed=1)
    with pytest.raises(PlasticityError, match="transform the model again"):
        state(bio).draw()


def test_another_use_of_a_weight_does_not_get_other_factors() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.fc(torch.relu(self.fc(x)))

    once = biofx.transform(Shared(), passes='scale-gradients{dtype=seed,only="fc#1"}').graph_module
    _, report = biofx.transform(once, passes="scale-gradients{dtype=seed,nu=0.3}")
    assert report.remarks[0].message == "its weight has factors from another draw already"
    both, report = biofx.transform(once, passes="scale-gradients{dtype=seed}")
    assert [remark.kind for remark in report.remarks] == ["applied", "missed"]
    assert biofx.check(both).ok


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_attached_steps_equal_those_with_stored_rates(
    optimizer: type[torch.optim.Optimizer], mlp: nn.Module, vectors: Tensor
) -> None:
    models, records = [], []
    for dtype in ("seed", "float32"):
        bio = biofx.transform(mlp, {"fuzzy_lr_dtype": dtype}).graph_module
        options: dict[str, Any] = {"lr": 0.1}
        stepping, monitor = optimizer(bio.parameters(), **options), biofx.Monitor()
        biofx.attach(bio, stepping, ["volume_dependent_lr"], observers=[monitor])
        for _ in range(3):
            gradients(bio, vectors)
            stepping.step()
        models.append(bio)
        records.append(monitor.records[-1].layers["0.weight"])
    first, second = (model.get_parameter("0.weight") for model in models)
    assert torch.equal(first, second)
    assert records[0].factor_histogram == records[1].factor_histogram
    assert records[0].factor_std == records[1].factor_std


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # of forward mode itself
def test_forward_mode_second_derivatives_and_samples(vectors: Tensor) -> None:
    weight, tangent = torch.randn(3, 4), torch.randn(3, 4)
    output, moved = jvp(lambda w: scale_gradient_by_seed(w, **OPTIONS), (weight,), (tangent,))[:2]
    assert torch.equal(output, weight)
    assert torch.equal(moved, tangent * factors((3, 4)))

    def loss(w: Tensor, x: Tensor) -> Tensor:
        return (x @ scale_gradient_by_seed(w, **OPTIONS).t()).pow(3).sum()

    (first,) = torch.autograd.grad(loss(weight.requires_grad_(), vectors), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    inner = weight.detach().clone().requires_grad_()
    scaled = torch.autograd.grad((vectors @ inner.t()).pow(3).sum(), inner, create_graph=True)[0]
    assert torch.allclose(first, scaled * factors((3, 4)))
    expected = torch.autograd.grad((scaled * factors((3, 4))).sum(), inner)[0] * factors((3, 4))
    torch.testing.assert_close(second, expected)

    each = vmap(grad(loss), in_dims=(None, 0))(weight.detach(), vectors[:, None])
    for place, x in enumerate(vectors):
        (alone,) = torch.autograd.grad((x @ inner.t()).pow(3).sum(), inner)
        torch.testing.assert_close(each[place], alone * factors((3, 4)))


def test_a_gradient_that_others_hold_is_not_changed() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    given = torch.ones(4, 4)
    scale_gradient_by_seed(weight, **OPTIONS).backward(given)
    assert torch.equal(given, torch.ones(4, 4))
    assert torch.equal(weight.grad, factors((4, 4)))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_and_layouts_of_weights(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 6, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    weight.requires_grad_()
    x = torch.randn(2, 6, 5, 5).to(dtype)
    plain = torch.autograd.grad(nn.functional.conv2d(x, weight).square().sum(), weight)[0]
    scaled = scale_gradient_by_seed(weight, **OPTIONS)
    found = torch.autograd.grad(nn.functional.conv2d(x, scaled).square().sum(), weight)[0]
    assert torch.equal(found, plain * factors((4, 6, 3, 3)).to(dtype))
