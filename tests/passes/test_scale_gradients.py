from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import biofx
from biofx.config import RATE_DTYPES
from biofx.operators.rate_ops import scale_gradient
from biofx.operators.rate_sampling import Distribution
from biofx.passes import ConstrainSigns, ScaleGradients
from biofx.plasticity.bio_module import BioModule


def scale(model: nn.Module, **options: Any) -> biofx.PassResult:
    return biofx.transform(model, passes=ScaleGradients(**options))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed loss by parameter name, whatever the module is called in."""
    model.zero_grad()
    model(x).square().sum().backward()
    return {
        name.removeprefix("_orig_mod."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def factors(bio: nn.Module) -> dict[str, Tensor]:
    """The factor of each parameter, 1 for those that have none."""
    found = {name: torch.ones_like(parameter) for name, parameter in bio.named_parameters()}
    for path, module in bio.named_modules():
        if isinstance(module, BioModule) and module.fuzzy_learning_rate_parameters is not None:
            found[f"{path.removesuffix('bio_mod')}weight"] = module.fuzzy_learning_rate_parameters.float()
    return found


def reasons(report: biofx.Report) -> dict[str, str]:
    return {remark.layer: remark.message for remark in report.remarks if remark.kind == "missed"}


def test_graph_and_report(residual_net: nn.Module, golden: Callable[[str, str], None]) -> None:
    bio, report = scale(residual_net)
    golden("scale_gradients", f"{biofx.format_graph(bio)}\n\n{report}")


@pytest.mark.parametrize("distribution", [d for d in Distribution if d.value != "baseline"])
def test_gradient_is_the_plain_one_times_the_factor_to_the_bit(
    distribution: biofx.Distribution, mlp: nn.Module, vectors: Tensor
) -> None:
    bio, _ = scale(mlp, distribution=distribution, nu=0.3)
    assert torch.equal(bio(vectors), mlp(vectors))
    plain, scaled, factor = gradients(mlp, vectors), gradients(bio, vectors), factors(bio)
    assert plain.keys() == scaled.keys()
    for name in plain:
        assert torch.equal(scaled[name], plain[name] * factor[name]), name
    assert factor["0.weight"].std() > 0.05


def test_one_step_of_sgd_moves_each_weight_by_its_own_rate(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = scale(mlp, nu=0.5)
    weight = bio.get_parameter("0.weight")
    before = weight.detach().clone()
    step = 0.1 * gradients(mlp, vectors)["0.weight"] * factors(bio)["0.weight"]
    gradients(bio, vectors)
    torch.optim.SGD(bio.parameters(), lr=0.1).step()
    torch.testing.assert_close(weight.detach(), before - step)


def reloaded(bio: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(bio, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def stock_pickle(bio: nn.Module) -> nn.Module:
    """Pickle the way a plain GraphModule does: as code that is traced again when it is loaded."""
    plain = torch.fx.GraphModule(bio, copy.deepcopy(bio.graph))  # type: ignore[arg-type]
    loaded: nn.Module = pickle.loads(pickle.dumps(plain))
    return loaded


@pytest.mark.parametrize(
    "survive",
    [
        copy.deepcopy,
        lambda bio: pickle.loads(pickle.dumps(bio)),
        reloaded,
        stock_pickle,
        torch.fx.symbolic_trace,
        lambda bio: torch.fx.Transformer(bio).transform(),
        lambda bio: biofx.transform(bio)[0],
        lambda bio: torch.compile(bio, backend="aot_eager", fullgraph=True),
        lambda bio: torch.export.export(bio, (torch.randn(5, 4),)).module(),
        lambda bio: torch.export.export(bio, (torch.randn(5, 4),), strict=True).module(),
        lambda bio: bio.to(torch.float64).to(torch.float32),
    ],
    ids=[
        "deepcopy",
        "pickle",
        "torch.save",
        "pickle of a plain GraphModule",
        "tracing again",
        "fx.Transformer",
        "transform again",
        "compile",
        "export",
        "strict export",
        "to float64 and back",
    ],
)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("dtype", RATE_DTYPES)
def test_the_effect_survives(
    survive: Callable[[Any], nn.Module], dtype: str, mlp: nn.Module, vectors: Tensor
) -> None:
    bio, _ = scale(mlp, nu=0.5, dtype=dtype)
    plain, factor = gradients(mlp, vectors), factors(bio)
    survivor = survive(bio)
    torch.testing.assert_close(survivor(vectors), mlp(vectors))
    found = gradients(survivor, vectors)
    assert found.keys() == plain.keys()
    for name in plain:
        torch.testing.assert_close(found[name], plain[name] * factor[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "seed"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
def test_the_effect_survives_the_default_compiler(dtype: str, mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = scale(mlp, nu=0.5, dtype=dtype)
    plain, factor = gradients(mlp, vectors), factors(bio)
    found = gradients(torch.compile(bio), vectors)  # type: ignore[arg-type]
    for name in plain:
        torch.testing.assert_close(found[name], plain[name] * factor[name])


@pytest.mark.parametrize("dtype", RATE_DTYPES)
def test_the_effect_survives_vmap_of_grad(dtype: str, mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = scale(mlp, nu=0.5, dtype=dtype)
    parameters: dict[str, Tensor] = dict(bio.named_parameters())
    buffers = dict(bio.named_buffers())

    def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(bio, (given, buffers), (x,))
        return output.square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, vectors)
    factor = factors(bio)
    for number, x in enumerate(vectors):
        for name, plain in gradients(mlp, x).items():
            torch.testing.assert_close(per_sample[name][number], plain * factor[name])


def test_second_derivatives_are_scaled_too(vectors: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 1))
    bio, _ = scale(model, nu=0.5)
    weight = bio.get_parameter("0.weight")
    (first,) = torch.autograd.grad(bio(vectors).pow(3).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    factor = factors(bio)["0.weight"].squeeze()
    with torch.no_grad():
        curvature = (6 * bio(vectors)).squeeze()
        expected = torch.stack([(curvature * (vectors @ factor) * x).sum() for x in vectors.T]) * factor
    torch.testing.assert_close(second.squeeze(), expected)


def test_each_weight_has_a_draw_that_depends_on_seed_and_path_alone(mlp: nn.Sequential) -> None:
    first, second = factors(scale(mlp)[0]), factors(scale(mlp)[0])
    only, other = factors(scale(mlp, only="2")[0]), factors(scale(mlp, seed=1)[0])
    assert torch.equal(first["2.weight"], second["2.weight"])
    assert torch.equal(first["2.weight"], only["2.weight"])
    assert not torch.equal(first["2.weight"], other["2.weight"])
    assert not torch.equal(first["0.weight"].flatten()[:8], first["4.weight"].flatten())


def test_layer_adaptive_spread_halves_from_first_to_last_layer() -> None:
    model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(5)))
    found = factors(scale(model, distribution="layer_adaptive", nu=0.4)[0])
    for place in range(5):
        expected = 0.4 * (1 - 0.5 * place / 4) / 3**0.5
        assert found[f"{place}.weight"].std().item() == pytest.approx(expected, rel=0.02)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.fc(x)))  # type: ignore[no-any-return]


def test_weight_of_a_layer_called_twice_is_scaled_once(vectors: Tensor) -> None:
    model = Shared()
    bio, report = scale(model, nu=0.5)
    assert len(bio.graph.find_nodes(op="call_function", target=scale_gradient)) == 1
    assert report.remarks[1].message.endswith("one set for 2 uses of the weight")
    expected = gradients(model, vectors)["fc.weight"] * factors(bio)["fc.weight"]
    torch.testing.assert_close(gradients(bio, vectors)["fc.weight"], expected)


def test_one_call_of_a_layer_can_be_scaled_alone(vectors: Tensor) -> None:
    model = Shared()
    bio, _ = scale(model, nu=0.5, only="fc#1")
    weight = model.fc.weight
    hidden = torch.relu(model.fc(vectors))
    split_weight = weight.detach().clone().requires_grad_()
    output = nn.functional.linear(hidden, split_weight, model.fc.bias)
    through_first, through_second = torch.autograd.grad(output.square().sum(), [weight, split_weight])
    expected = through_first + through_second * factors(bio)["fc.weight"]
    torch.testing.assert_close(gradients(bio, vectors)["fc.weight"], expected)
    both, report = scale(bio, nu=0.3)
    assert torch.equal(factors(both)["fc.weight"], factors(bio)["fc.weight"])
    assert [remark.kind for remark in report.remarks] == ["applied", "missed"]


def test_uses_of_one_weight_with_different_options_are_refused() -> None:
    passes = biofx.Pipeline.parse('scale-gradients{@"fc#1"{nu=0.4}}')
    with pytest.raises(biofx.OptionError, match=r"the uses of 'fc.weight' are given different options"):
        biofx.transform(Shared(), passes=passes)


def test_tied_weights_have_one_set_of_factors(vectors: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    bio, _ = scale(model, nu=0.5)
    assert [name for name, _ in bio.named_buffers()] == ["0.bio_mod.fuzzy_learning_rate_parameters"]
    expected = gradients(model, vectors)["0.weight"] * factors(bio)["0.weight"]
    torch.testing.assert_close(gradients(bio, vectors)["0.weight"], expected)


def test_weight_that_an_embedding_shares_is_scaled_once() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False))
    model[2].weight = model[0].weight
    bio, report = scale(model)
    assert [remark.kind for remark in report.remarks] == ["applied"] * 3
    assert report.remarks[0].message == report.remarks[2].message
    assert report.remarks[0].message.endswith("one set for 2 uses of the weight")
    assert len(list(bio.graph.find_nodes(op="call_function", target=scale_gradient))) == 2


def test_frozen_weight_is_left_alone(mlp: nn.Sequential) -> None:
    mlp[0].weight.requires_grad_(False)
    bio, report = scale(mlp)
    assert reasons(report) == {"0": "its weight is frozen (requires_grad is False)"}
    assert "0.bio_mod.fuzzy_learning_rate_parameters" not in bio.state_dict()


@pytest.mark.parametrize("options", [{"distribution": "baseline"}, {"nu": 0}])
def test_factors_of_one_change_nothing(options: dict[str, Any], mlp: nn.Module) -> None:
    _, report = scale(mlp, **options)
    assert not report.modified
    assert all(message.startswith("every factor would be 1") for message in reasons(report).values())


def test_weight_without_values_is_left_alone() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    _, report = scale(model)
    assert reasons(report) == {"0": "its weight is on the meta device and has no values"}


def test_layer_with_hooks_is_left_alone(mlp: nn.Sequential) -> None:
    mlp[0].register_forward_hook(lambda module, args, output: None)
    torch.nn.utils.spectral_norm(mlp[2])
    bio, report = scale(mlp)
    assert reasons(report) == {
        "0": "it has forward hooks, which would no longer run",
        "2": "it has forward pre hooks, which would no longer run",
    }
    assert len(bio.get_submodule("0")._forward_hooks) == 1


def test_a_second_application_changes_nothing(mlp: nn.Module) -> None:
    once, _ = scale(mlp, nu=0.5)
    twice, report = scale(once, nu=0.9, seed=3)
    assert not report.modified
    assert set(reasons(report).values()) == {"its gradient is scaled already"}
    assert torch.equal(factors(twice)["0.weight"], factors(once)["0.weight"])


def test_scaling_stands_outside_the_sign_constraint(mlp: nn.Module) -> None:
    passes = biofx.Pipeline((ScaleGradients(), ConstrainSigns(constrain_readout=True)))
    bio, _ = biofx.transform(mlp, passes=passes)
    text = biofx.format_graph(bio)
    assert "_2_signed = constrain_sign(_2_weight, _0_sign, method='project')" in text
    assert "_2_scaled = scale_gradient(_2_signed, _2_rates)" in text


def test_state_dict_goes_both_ways(mlp: nn.Module) -> None:
    bio, _ = scale(mlp, nu=0.5)
    plain_keys = list(mlp.state_dict())
    assert [key for key in bio.state_dict() if "bio_mod" not in key] == plain_keys
    kept = factors(bio)["0.weight"].clone()
    other = copy.deepcopy(mlp)
    with torch.no_grad():
        other.get_parameter("0.weight").fill_(3)
    bio.load_state_dict(other.state_dict())
    assert torch.equal(bio.get_parameter("0.weight"), other.get_parameter("0.weight"))
    assert torch.equal(factors(bio)["0.weight"], kept)
    fresh, _ = scale(mlp, nu=0.5, seed=9)
    fresh.load_state_dict(bio.state_dict())
    assert torch.equal(factors(fresh)["0.weight"], kept)
    mlp.load_state_dict({key: value for key, value in bio.state_dict().items() if "bio_mod" not in key})
    assert (mlp.get_parameter("0.weight") == 3).all()


def test_accumulated_gradients_are_scaled_once(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = scale(mlp, nu=0.5)
    for x in (vectors[:2], vectors[2:]):
        bio(x).square().sum().backward()
    expected = gradients(mlp, vectors)["0.weight"] * factors(bio)["0.weight"]
    torch.testing.assert_close(bio.get_parameter("0.weight").grad, expected)


def test_the_effect_holds_under_autocast(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = scale(mlp, nu=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, scaled = gradients(mlp, vectors), gradients(bio, vectors)
    assert torch.equal(scaled["0.weight"], plain["0.weight"] * factors(bio)["0.weight"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_keep_the_dtype_of_the_weight(dtype: torch.dtype, vectors: Tensor) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).to(dtype)
    bio, _ = scale(model, nu=0.5)
    plain, scaled = gradients(model, vectors.to(dtype)), gradients(bio, vectors.to(dtype))
    factor = factors(bio)["0.weight"]
    assert factor.dtype == torch.float32
    assert scaled["0.weight"].dtype == dtype
    assert torch.equal(scaled["0.weight"], plain["0.weight"] * factor.to(dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"nu": -0.1},
        {"nu": 1.1},
        {"nu": "0.1"},
        {"granularity": "row"},
        {"distribution": "unifrom"},
        {"low": -1},
        {"high": 0},
        {"seed": 1.5},
        {"seed": -1},
    ],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(biofx.OptionError, match=f"scale-gradients: {name}: expected .* found"):
        ScaleGradients(**options)


def test_bounds_must_enclose_one() -> None:
    with pytest.raises(biofx.OptionError, match=r"high: expected a number in \[1, inf\), found 0.9"):
        ScaleGradients(low=0.2, high=0.9)


def test_bounds_that_leave_no_room_are_refused(mlp: nn.Module, unchanged: Any) -> None:
    with unchanged(mlp), pytest.raises(biofx.OptionError, match=r"leave room for normal with nu=0.2"):
        scale(mlp, distribution="normal", nu=0.2, low=1.0, high=1.0)


def test_factors_from_a_seed_are_printed_with_what_they_are_sampled_from(mlp: nn.Module) -> None:
    text = "scale-gradients{dtype=seed,distribution=layer_adaptive,granularity=neuron,nu=0.4,seed=3}"
    lines = biofx.format_graph(biofx.transform(mlp, passes=text).graph_module).splitlines()
    shown = "distribution='layer_adaptive', nu=0.4, low=0.5, high=2.0, seed=3, path='0.weight'"
    assert f"_0_scaled = scale_gradient_by_seed(_0_weight, {shown}, granularity='neuron')" in lines
