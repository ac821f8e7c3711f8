from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Interpreter

import biofx
from biofx import BioConfig, OptionError, passes
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import whole_weight
from biofx.operators.sign_ops import SIGN_METHODS

WIDTHS = (2, 3, 4, 6)
OFF = {"fuzzy_lr_distribution": "baseline"}
property_test = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return x + self.inner(x)


class Concatenate(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Any:
        return torch.cat([self.left(x), self.right(x)], 1)


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(torch.tanh(self.layer(x)))


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return nn.functional.dropout(x, 0.3, self.training) + torch.rand(1) * 0.1


@st.composite
def models(draw: Callable[[Any], Any]) -> tuple[nn.Module, Tensor]:
    """A chain of blocks over units of shape ``(batch, units)`` or ``(batch, units, 5)``, and an input."""
    convolutional = draw(st.booleans())
    width = first = draw(st.sampled_from(WIDTHS))

    def layer(out: int, into: int) -> nn.Module:
        bias = draw(st.booleans())
        if not convolutional:
            return nn.Linear(into, out, bias=bias)
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if into % g == 0 and out % g == 0]))
        if draw(st.booleans()):
            return nn.ConvTranspose1d(into, out, 3, padding=1, groups=groups, bias=bias)
        mode = draw(st.sampled_from(["zeros", "circular"]))
        return nn.Conv1d(into, out, 3, padding="same", padding_mode=mode, groups=groups, bias=bias)

    def block(width: int) -> tuple[nn.Module, int]:
        kind = draw(st.sampled_from(["layer", "residual", "concatenate", "twice", "shape-free"]))
        out = draw(st.sampled_from(WIDTHS))
        if kind == "layer":
            return layer(out, width), out
        if kind == "residual":
            return Residual(nn.Sequential(layer(out, width), nn.ReLU(), layer(width, out))), width
        if kind == "concatenate":
            return Concatenate(layer(out, width), layer(2, width)), out + 2
        if kind == "twice":
            return Twice(layer(width, width)), width
        modules = [nn.ReLU(), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Identity(), Noisy(), nn.GELU()]
        return draw(st.sampled_from(modules)), width

    torch.manual_seed(draw(st.integers(0, 2**16)))
    blocks = []
    for _ in range(draw(st.integers(1, 5))):
        made, width = block(width)
        blocks.append(made)
    blocks.append(layer(draw(st.sampled_from(WIDTHS)), width))
    return nn.Sequential(*blocks), torch.randn(4, first, *([5] if convolutional else []))


def run(model: nn.Module, x: Tensor) -> tuple[Any, ...]:
    """Outputs, gradients and buffers after a call with a seed of its own."""
    model.zero_grad()
    torch.manual_seed(11)
    x = x.clone().requires_grad_()
    output = model(x)
    output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return output, x.grad, gradients, {name: b.clone() for name, b in model.named_buffers()}


def applied(report: biofx.Report) -> dict[str, list[bool]]:
    """For each layer, which of its calls were rewritten."""
    found: dict[str, list[bool]] = {}
    for remark in report.remarks:
        found.setdefault(remark.layer, []).append(remark.kind == "applied")
    return found


@property_test
@given(models(), st.booleans())
def test_with_everything_off_the_result_is_the_model_to_the_bit(
    given_model: tuple[nn.Module, Tensor], training: bool
) -> None:
    model, x = given_model
    bio_model, report = biofx.transform(model.train(training), OFF)
    assert not report.modified
    torch.testing.assert_close(run(bio_model, x), run(model, x), rtol=0, atol=0)


@property_test
@given(models(), st.booleans(), st.booleans())
def test_what_leaves_weights_as_they_are_leaves_outputs_as_they_are_to_the_bit(
    given_model: tuple[nn.Module, Tensor], training: bool, twice: bool
) -> None:
    model, x = given_model
    bio_model, report = biofx.transform(model.train(training), passes="scale-gradients")
    assert report.modified
    if twice:
        bio_model = biofx.transform(bio_model, passes="scale-gradients").graph_module
    assert torch.equal(run(bio_model, x)[0], run(model, x)[0])


@property_test
@given(models(), st.sampled_from([0, 2, 3]), st.booleans(), st.sampled_from(["baseline", "normal"]))
def test_the_report_names_exactly_the_nodes_that_differ(
    given_model: tuple[nn.Module, Tensor], gamma: int, dale: bool, distribution: str
) -> None:
    model, _ = given_model
    config = BioConfig.from_dict(
        {
            "weight_splitting_Gamma": gamma,
            "apply_dales_principle": dale,
            "fuzzy_lr_distribution": distribution,
        }
    )
    before = biofx.format_graph(biofx.capture(model))
    try:
        bio_model, report = biofx.transform(model, config)
    except OptionError:
        assert any(site.output_channels % gamma for site in find_sites(biofx.capture(model)).found)
        return
    after = biofx.format_graph(bio_model)
    assert report.modified == (after != before)
    old, new = set(before.splitlines()), set(after.splitlines())
    assert {change.before for change in report.changes} - {None} == old - new
    assert {change.after for change in report.changes} - {None} == new - old
    assert report.modified == any(remark.kind == "applied" for remark in report.remarks)


def grouped(y: Tensor, gamma: int) -> Tensor:
    """Each channel replaced by the sum over its group of ``gamma`` neighbours, one by one."""
    result = torch.empty_like(y)
    for channel in range(y.shape[1]):
        start = channel - channel % gamma
        result[:, channel] = sum(y[:, member] for member in range(start, start + gamma))
    return result


@property_test
@given(models(), st.sampled_from([2, 3]))
def test_splitting_sums_groups_of_neighbouring_channels(
    given_model: tuple[nn.Module, Tensor], gamma: int
) -> None:
    model, x = given_model[0].double(), given_model[1].double()
    candidates = [site.output_channels for site in find_sites(biofx.capture(model)).found]
    try:
        bio_model, report = biofx.transform(model.eval(), passes=passes.SplitWeights(gamma=gamma))
    except OptionError:
        assert any(channels % gamma for channels in candidates)
        return
    reference = copy.deepcopy(model)
    for path, calls in applied(report).items():
        remaining = iter(calls)

        def group(module: nn.Module, args: Any, output: Tensor, remaining: Any = remaining) -> Tensor:
            return grouped(output, gamma) if next(remaining) else output

        reference.get_submodule(path).register_forward_hook(group)
    found, expected = run(bio_model, x), run(reference, x)
    torch.testing.assert_close(found[:2], expected[:2])


def columns(weight: Tensor, groups: int, transposed: bool) -> list[Tensor]:
    """All weights that leave each presynaptic unit."""
    if transposed:
        return list(weight)
    rows = weight.shape[0] // groups
    return [
        weight[group * rows : (group + 1) * rows, unit]
        for group in range(groups)
        for unit in range(weight.shape[1])
    ]


@property_test
@given(models(), st.sampled_from(SIGN_METHODS), st.floats(0, 1))
def test_a_unit_has_one_sign_whatever_is_written_into_the_parameters(
    given_model: tuple[nn.Module, Tensor], method: str, fraction: float
) -> None:
    model, x = given_model
    rule = passes.ConstrainSigns(
        method=method, excitatory_fraction=fraction, constrain_inputs=True, constrain_readout=True
    )
    bio_model = biofx.transform(model.eval(), passes=[rule, "scale-gradients"]).graph_module
    with torch.no_grad():
        for parameter in bio_model.parameters():
            parameter.normal_(std=3)
    interpreter = Interpreter(bio_model, garbage_collect_values=False)
    interpreter.run(x)
    sites = find_sites(bio_model).found
    assert sites
    for site in sites:
        effective = interpreter.env[site.weight_node]  # type: ignore[index]
        leaving = columns(effective, site.groups, site.kind.transposed)
        assert len(leaving) == site.input_channels
        for weights in leaving:
            assert not ((weights > 0).any() and (weights < 0).any())
        if method == "abs":
            assert torch.equal(effective.abs(), site.parameter.abs())
        excitatory = sum(bool((weights > 0).any()) for weights in leaving)
        assert excitatory <= round(site.input_channels * fraction)


@property_test
@given(models(), st.sampled_from(["uniform", "lognormal", "gamma", "layer_adaptive", "weight_adaptive"]))
def test_gradients_are_those_of_the_model_times_the_factors(
    given_model: tuple[nn.Module, Tensor], distribution: str
) -> None:
    model, x = given_model
    rule = passes.ScaleGradients(distribution=biofx.Distribution(distribution), nu=0.3)
    bio_model = biofx.transform(model.eval(), passes=rule).graph_module
    found, expected = run(bio_model, x)[2], run(model, x)[2]
    state = bio_model.state_dict()
    scaled = 0
    for name, gradient in expected.items():
        key = f"{name.removesuffix('.weight')}.bio_mod.fuzzy_learning_rate_parameters"
        factors = state[key] if name.endswith(".weight") and key in state else torch.ones(())
        scaled += key in state and name.endswith(".weight")
        torch.testing.assert_close(found[name], gradient * factors, rtol=0, atol=0)
    assert scaled == len(find_sites(bio_model).weights())


@property_test
@given(models(), st.integers(2, 4), st.booleans())
def test_sub_weights_keep_the_function_and_get_its_gradients(
    given_model: tuple[nn.Module, Tensor], gamma: int, levelled: bool
) -> None:
    model, x = given_model
    options = {"gamma": gamma, "mode": "sub-weights", "rates": "mean" if levelled else "sum"}
    bio, report = biofx.transform(model, passes=passes.SplitWeights(**options))  # type: ignore[arg-type]
    assert all(remark.kind == "applied" for remark in report.remarks)
    expected, found = run(model, x), run(bio, x)
    for wanted, given_back in zip(expected[:2], found[:2], strict=True):
        torch.testing.assert_close(given_back, wanted, rtol=1e-4, atol=1e-5)
    for name, gradient in expected[2].items():
        parts = [path for path in found[2] if whole_weight(path) == name]
        is_weight = len(bio.get_parameter(name).shape) > 1
        assert len(parts) == (gamma if is_weight else 1)
        for path in parts:
            level = gamma if is_weight and levelled else 1
            torch.testing.assert_close(found[2][path] * level, gradient, rtol=1e-3, atol=1e-4)
    plain = copy.deepcopy(model)
    plain.load_state_dict(biofx.checkpoints.plain_state(bio))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(plain.get_parameter(name), parameter)
    assert biofx.check(bio).ok
