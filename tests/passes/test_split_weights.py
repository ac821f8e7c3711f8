from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.operators.split_ops import pool_synapses
from biofx.passes import SplitWeights
from biofx.rewriting.remarks import Remark


def split(model: nn.Module, **options: object) -> biofx.PassResult:
    return biofx.transform(model, passes=SplitWeights(**options))  # type: ignore[arg-type]


def grouped_sum(y: Tensor, gamma: int, axis: int) -> Tensor:
    """Channel c of the result is the sum of the channels of c's group, written out one by one."""
    y = y.movedim(axis, 0)
    groups = [sum(y[g * gamma + member] for member in range(gamma)) for g in range(len(y) // gamma)]
    return torch.stack([torch.as_tensor(groups[c // gamma]) for c in range(len(y))]).movedim(0, axis)


def reasons(report: biofx.Report) -> dict[str, str]:
    return {remark.layer: remark.message for remark in report.remarks if remark.kind == "missed"}


def test_graph_and_report(residual_net: nn.Module, golden: Callable[[str, str], None]) -> None:
    bio, report = split(residual_net, gamma=2)
    golden("split_weights", f"{biofx.format_graph(bio)}\n\n{report}")


@pytest.mark.parametrize("gamma", [2, 3, 6])
def test_groups_of_neighbouring_features_are_summed(gamma: int) -> None:
    first, last = nn.Linear(4, 6), nn.Linear(6, 2)
    bio, _ = split(nn.Sequential(first, nn.ReLU(), last), gamma=gamma)
    for shape in [(4,), (5, 4), (5, 7, 4)]:
        x = torch.randn(shape)
        expected = last(torch.relu(grouped_sum(first(x), gamma, -1)))
        torch.testing.assert_close(bio(x), expected)


@pytest.mark.parametrize(
    ("layer", "last", "shape"),
    [
        (nn.Conv1d(2, 6, 3), nn.Conv1d(6, 1, 1), (2, 9)),
        (nn.Conv2d(2, 6, 3, groups=2), nn.Conv2d(6, 1, 1), (2, 9, 8)),
        (nn.Conv3d(2, 6, 3), nn.Conv3d(6, 1, 1), (2, 5, 6, 7)),
        (nn.ConvTranspose2d(2, 6, 3), nn.Conv2d(6, 1, 1), (2, 5, 5)),
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_channels_of_convolutions_are_summed(
    layer: nn.Module, last: nn.Module, shape: tuple[int, ...], batched: bool
) -> None:
    bio, _ = split(nn.Sequential(layer, last), gamma=3)
    x = torch.randn((4, *shape) if batched else shape)
    torch.testing.assert_close(bio(x), last(grouped_sum(layer(x), 3, 1 if batched else 0)))


def test_samples_of_a_batch_do_not_mix(residual_net: nn.Module, images: Tensor) -> None:
    bio, _ = split(residual_net.eval(), gamma=2)
    other = images.clone()
    other[2] += 1
    changed = (bio(images) != bio(other)).any(dim=1)
    assert changed.tolist() == [False, False, True, False, False]


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, negative_slope=0.05)


def doubled_sigmoid(x: Tensor) -> Tensor:
    return torch.sigmoid(x) * 2.0


def gained_tanh(x: Tensor) -> Tensor:
    return torch.tanh(x * 1.5)


@pytest.mark.parametrize(
    "function", [leaky, doubled_sigmoid, gained_tanh, F.silu, torch.tanh, nn.ReLU(), nn.Tanh()]
)
def test_activation_acts_on_every_synapse_before_the_sum(
    function: Callable[[Tensor], Tensor], vectors: Tensor
) -> None:
    first, last = nn.Linear(4, 6), nn.Linear(6, 2)
    bio, _ = split(nn.Sequential(first, last), gamma=2, activation=function)
    torch.testing.assert_close(bio(vectors), last(grouped_sum(function(first(vectors)), 2, -1)))


def test_activation_given_by_name(vectors: Tensor) -> None:
    first, last = nn.Linear(4, 6), nn.Linear(6, 2)
    bio, _ = split(nn.Sequential(first, last), activation="torch.nn.functional.softplus")
    torch.testing.assert_close(bio(vectors), last(grouped_sum(F.softplus(first(vectors)), 2, -1)))


def test_trainable_activation_is_kept_per_layer_and_trains(mlp: nn.Module, vectors: Tensor) -> None:
    prelu = nn.PReLU()
    bio, _ = split(mlp, gamma=2, activation=prelu)
    added = [name for name, _ in bio.named_parameters() if "bio_mod" in name]
    assert added == ["0.bio_mod.splitting_activation.weight", "2.bio_mod.splitting_activation.weight"]
    bio(vectors).sum().backward()
    slopes = [bio.get_parameter(name) for name in added]
    assert slopes[0] is not slopes[1]
    assert all(slope is not prelu.weight and slope.grad is not None for slope in slopes)


def test_output_layers_are_found_through_everything_that_has_no_weights() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Conv2d(1, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.features = nn.Conv2d(4, 4, 3)
            self.classes = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = torch.relu(self.norm(self.trunk(x)))
            features = self.features(x)
            return {
                "features": features.sigmoid(),
                "classes": self.classes(features.mean((2, 3))).softmax(-1),
            }

    _, report = split(TwoHeads(), gamma=2)
    assert [remark.layer for remark in report.remarks if remark.kind == "applied"] == ["trunk"]
    assert set(reasons(report)) == {"features", "classes"}
    assert all("output layer" in message for message in reasons(report).values())


def test_layer_marked_as_last_module_is_left_alone(mlp: nn.Sequential) -> None:
    mlp[2].last_module_token = True  # type: ignore[assignment]
    _, report = split(mlp, gamma=2)
    assert reasons(report)["2"].startswith("it is marked as the last module; ")


def test_gamma_that_does_not_divide_a_layer_leaves_that_layer_alone(mlp: nn.Module) -> None:
    _, report = split(mlp, gamma=3)
    (remark,) = [remark for remark in report.remarks if remark.layer == "2"]
    message = (
        "Γ does not divide its 4 output channels"
        " (gamma=3, in a config weight_splitting_Gamma); for equal rates 3 times the step of a plain layer, "
        "since it reads sums of 3"
    )
    assert remark == Remark("missed", "_2", "2", message, {"gamma": 3, "channels": 4, "step": 3})


def test_gamma_that_divides_no_layer_is_refused(mlp: nn.Module, unchanged: Any) -> None:
    with unchanged(mlp), pytest.raises(biofx.OptionError, match=r"gamma=5.*0 has 6, 2 has 4"):
        split(mlp, gamma=5)


@pytest.mark.parametrize("gamma", [0, 1])
def test_gamma_of_0_and_1_is_off(gamma: int, mlp: nn.Module) -> None:
    _, report = split(mlp, gamma=gamma)
    assert not report.modified
    assert reasons(report)["0"] == f"it is off (gamma={gamma}, in a config weight_splitting_Gamma)"


def test_layer_that_is_never_called_is_reported() -> None:
    class WithSpare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.head, self.spare = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.used(x))  # type: ignore[no-any-return]

    _, report = split(WithSpare(), gamma=2)
    assert reasons(report)["spare"] == "never called in the forward"


def test_layer_inside_an_opaque_module_is_reported() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8), nn.Linear(4, 4), nn.Linear(4, 2))
    _, report = split(biofx.capture(model, opaque=["0"]), gamma=2)
    assert (
        reasons(report)["0.linear1"]
        == "inside '0' (TransformerEncoderLayer), which the graph calls as a whole"
    )


def test_layer_called_twice_is_split_at_both_calls(vectors: Tensor) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(torch.relu(self.fc(x))))  # type: ignore[no-any-return]

    model = Twice()
    bio, report = split(model, gamma=2)
    assert [remark.node for remark in report.remarks if remark.kind == "applied"] == ["fc", "fc_1"]
    inner = torch.relu(grouped_sum(model.fc(vectors), 2, -1))
    torch.testing.assert_close(bio(vectors), model.head(grouped_sum(model.fc(inner), 2, -1)))


@pytest.mark.parametrize("activation", ["identity", leaky, nn.ReLU(), nn.PReLU()])
def test_a_second_application_changes_nothing(activation: object, mlp: nn.Module) -> None:
    once, _ = split(mlp, gamma=2, activation=activation)
    twice, report = split(once, gamma=2, activation=activation)
    assert not report.modified
    assert reasons(report)["0"] == "its output is split already"
    assert biofx.format_graph(twice) == biofx.format_graph(once)


def test_gradients_are_those_of_the_definition(mlp: nn.Sequential, vectors: Tensor) -> None:
    bio, _ = split(mlp, gamma=2)
    bio(vectors).square().sum().backward()
    reference = copy.deepcopy(mlp)
    x = torch.relu(grouped_sum(reference[0](vectors), 2, -1))
    reference[4](torch.relu(grouped_sum(reference[2](x), 2, -1))).square().sum().backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(bio.get_parameter(name).grad, parameter.grad)


def test_copies_and_pickles_compute_the_same_and_are_independent(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = split(mlp, gamma=2, activation=leaky)
    for copied in (copy.deepcopy(bio), pickle.loads(pickle.dumps(bio))):
        assert torch.equal(copied(vectors), bio(vectors))
        before = bio(vectors)
        with torch.no_grad():
            copied.get_parameter("0.weight").zero_()
        assert torch.equal(bio(vectors), before)


def test_wrong_input_at_run_time_is_a_clear_error() -> None:
    with pytest.raises(biofx.OptionError, match=r"multiple of gamma=2, found shape \(3, 5\)"):
        pool_synapses(torch.zeros(3, 5), gamma=2, channel_axis=-1)


@pytest.mark.parametrize("options", [{"gamma": -1}, {"gamma": 2.0}, {"gamma": True}, {"activation": 3}])
def test_bad_options_are_refused(options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(biofx.OptionError, match=f"split-weights: {name}: expected"):
        SplitWeights(**options)  # type: ignore[arg-type]


def test_an_option_that_the_pass_does_not_have_is_named_with_the_nearest() -> None:
    with pytest.raises(biofx.OptionError, match="split-weights has no option 'gama'; did you mean 'gamma'"):
        SplitWeights(gama=2)  # type: ignore[call-arg]


@pytest.mark.parametrize("gamma", [2, 4])
def test_report_says_how_wide_layers_are_and_how_large_their_steps(gamma: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 4, 3), nn.Tanh(), nn.Flatten()),
        *(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
    ).double()
    x, rate = torch.randn(3, 2, 5, 5, dtype=torch.float64), 1e-3
    options = {"weight_splitting_Gamma": gamma, "fuzzy_lr_distribution": "baseline"}
    split, report = biofx.transform(net, options)
    before, plain = biofx.deploy(split), biofx.deploy(split)
    for model in (split, plain):
        model(x).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=rate).step()
    after = biofx.deploy(split)
    said = {remark.layer: remark for remark in report.remarks if "for equal rates" in remark.message}
    factors = {"0": gamma, "2": gamma**2, "5": gamma**2, "7": gamma}
    for layer, factor in factors.items():
        start, one, found = (
            model.get_parameter(f"{layer}.weight").detach() for model in (before, plain, after)
        )
        torch.testing.assert_close(found - start, factor * (one - start), rtol=1e-9, atol=1e-15)
        assert said[layer].details["step"] == factor
        assert f"for equal rates {factor} times the step of a plain layer" in said[layer].message
        width = f"deployed, {len(start)} channels" if layer != "7" else f"reads sums of {gamma}"
        assert width in said[layer].message


def test_report_says_no_step_where_steps_are_levelled(mlp: nn.Module) -> None:
    _, report = split(mlp, gamma=2, rates="mean")
    message, *_ = [remark.message for remark in report.remarks if remark.layer == "0"]
    assert message == "3 groups of 2 of its 6 output channels summed; deployed, 3 channels"
    assert not any("step" in remark.details for remark in report.remarks)
