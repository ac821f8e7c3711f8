from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

import biofx
from biofx.operators.rate_ops import observe_activity
from biofx.passes import ObserveActivity


def observe(model: nn.Module, **options: Any) -> tuple[Any, biofx.Report]:
    result = biofx.transform(model, passes=ObserveActivity(), **options)
    return result.graph_module, result.report


def activity(model: nn.Module, layer: str) -> Tensor:
    found = model.get_submodule(layer).bio_mod.activity  # type: ignore[union-attr]
    assert isinstance(found, Tensor)
    return found


def reasons(report: biofx.Report) -> dict[str, str]:
    return {remark.layer: remark.message for remark in report.remarks if remark.kind == "missed"}


def messages(report: biofx.Report) -> dict[str, str]:
    return {remark.layer: remark.message for remark in report.remarks if remark.kind == "applied"}


def test_graph_and_report(residual_net: nn.Module, golden: Callable[[str, str], None]) -> None:
    bio, report = observe(residual_net)
    golden("observe_activity", f"{biofx.format_graph(bio)}\n\n{report}")


def test_outputs_and_gradients_are_those_of_the_model(
    residual_net: nn.Module, images: Tensor, unchanged: Callable[[nn.Module], Any]
) -> None:
    residual_net.eval()
    with unchanged(residual_net):
        bio, _ = observe(residual_net)
    assert torch.equal(bio(images), residual_net(images))
    bio.train()
    residual_net.train()
    for model in (bio, residual_net):
        torch.manual_seed(0)
        model(images).square().sum().backward()
    for name, parameter in residual_net.named_parameters():
        expected = parameter.grad
        assert expected is not None
        assert torch.equal(bio.get_parameter(name).grad, expected), name


def test_running_mean_by_hand(mlp: nn.Module) -> None:
    bio, _ = observe(mlp)
    assert (activity(bio, "0") == -1).all()
    generator, expected = torch.Generator().manual_seed(0), None
    for _ in range(4):
        x = torch.randn(5, 4, generator=generator)
        bio(x)
        mean = torch.relu(mlp.get_submodule("0")(x)).abs().mean(0).detach()
        expected = mean if expected is None else 0.9 * expected + 0.1 * mean
    assert expected is not None
    torch.testing.assert_close(activity(bio, "0"), expected)
    assert (activity(bio, "4") >= 0).all()


def test_channels_of_images_are_units(residual_net: nn.Module, images: Tensor) -> None:
    bio, _ = observe(residual_net)
    bio(images)
    expected = torch.relu(residual_net.get_submodule("stem")(images)).mean((0, 2, 3)).detach()
    torch.testing.assert_close(activity(bio, "stem"), expected)


def test_unbatched_inputs_have_the_same_units(residual_net: nn.Module, images: Tensor) -> None:
    stem = nn.Sequential(residual_net.get_submodule("stem"), nn.ReLU())
    batched, _ = observe(stem)
    single, _ = observe(stem)
    batched(images[:1])
    single(images[0])
    torch.testing.assert_close(activity(single, "0"), activity(batched, "0"))


def test_eval_observes_nothing_and_train_goes_on(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = observe(mlp)
    bio(vectors)
    seen = activity(bio, "0").clone()
    bio.eval()
    bio(vectors * 10)
    assert torch.equal(activity(bio, "0"), seen)
    bio.train()
    bio(vectors * 10)
    assert not torch.equal(activity(bio, "0"), seen)


class Places(nn.Module):
    """Layers whose nonlinearity comes at once, late, as a method, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.normed, self.method, self.bare, self.branching = (nn.Linear(4, 4) for _ in range(4))
        self.norm = nn.BatchNorm1d(4)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(F.dropout(self.norm(self.normed(x)), 0.0))
        x = self.method(x).tanh()
        x = self.bare(x).flatten(1)
        y: Tensor = self.branching(x)
        return torch.relu(y) + y


def test_units_are_observed_behind_their_own_nonlinearity(vectors: Tensor) -> None:
    model = Places()
    bio, report = observe(model)
    assert messages(report) == {
        "normed": "4 units observed behind gelu",
        "method": "4 units observed behind tanh",
        "bare": "4 units observed as they are, for want of a nonlinearity",
        "branching": "4 units observed as they are, for want of a nonlinearity",
    }
    bio(vectors)
    first = F.gelu(model.norm(model.normed(vectors)))
    second = torch.tanh(model.method(first))
    third = model.bare(second)
    fourth = model.branching(third)
    for layer, output in zip(
        ("normed", "method", "bare", "branching"), (first, second, third, fourth), strict=True
    ):
        torch.testing.assert_close(activity(bio, layer), output.abs().mean(0).detach())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(x).relu()).relu()  # type: ignore[no-any-return]


def test_layer_called_twice_has_one_activity_that_sees_both(vectors: Tensor) -> None:
    model = Twice()
    bio, report = observe(model)
    assert [remark.kind for remark in report.remarks] == ["applied", "applied"]
    bio(vectors)
    first = torch.relu(model.fc(vectors))
    second = torch.relu(model.fc(first))
    expected = 0.9 * first.mean(0) + 0.1 * second.mean(0)
    torch.testing.assert_close(activity(bio, "fc"), expected.detach())


def test_second_application_is_refused_layer_by_layer(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = observe(mlp)
    again, report = observe(bio)
    assert not report.modified
    assert set(reasons(report).values()) == {"its activity is observed already"}
    assert biofx.format_graph(again) == biofx.format_graph(bio)
    for model in (bio, again):
        model(vectors)
    assert torch.equal(activity(bio, "0"), activity(again, "0"))


def test_layers_that_are_not_selected_or_not_reached(mlp: nn.Module) -> None:
    _, report = observe(mlp, exclude="2")
    assert list(messages(report)) == ["0", "4"]
    assert "2" in reasons(report)

    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    _, report = observe(Idle())
    assert reasons(report) == {"unused": "never called in the forward"}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_observe_for_themselves(
    duplicate: Callable[[nn.Module], nn.Module], mlp: nn.Module, vectors: Tensor
) -> None:
    bio, _ = observe(mlp)
    bio(vectors)
    twin = duplicate(bio)
    assert torch.equal(activity(twin, "0"), activity(bio, "0"))
    seen = activity(bio, "0").clone()
    twin(vectors * 3)
    assert torch.equal(activity(bio, "0"), seen)
    assert not torch.equal(activity(twin, "0"), seen)
    twin.eval()
    seen = activity(twin, "0").clone()
    twin(vectors)
    assert torch.equal(activity(twin, "0"), seen)


def test_traced_again_it_still_observes(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = observe(mlp)
    again = torch.fx.symbolic_trace(bio)
    again(vectors)
    assert (activity(bio, "0") >= 0).all()


def test_compiled_it_observes_the_same(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = observe(mlp)
    twin = copy.deepcopy(bio)
    compiled: Any = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(vectors), bio(vectors))
    torch.testing.assert_close(activity(twin, "0"), activity(bio, "0"))
    twin.eval()
    seen = activity(twin, "0").clone()
    compiled(vectors)
    assert torch.equal(activity(twin, "0"), seen)


def test_per_sample_gradients_observe_nothing(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = observe(mlp)
    parameters = dict(bio.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(bio, weights, (x,)).square().sum()  # type: ignore[no-any-return]

    per_sample = vmap(grad(loss), (None, 0))(parameters, vectors)
    assert (activity(bio, "0") == -1).all()
    summed = {name: value.sum(0) for name, value in per_sample.items()}
    bio(vectors).square().sum().backward()
    for name, parameter in bio.named_parameters():
        torch.testing.assert_close(summed[name], parameter.grad)


def test_checkpoints_go_both_ways(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = observe(mlp)
    bio(vectors)
    fresh, _ = observe(mlp)
    fresh.load_state_dict(bio.state_dict())
    assert torch.equal(activity(fresh, "0"), activity(bio, "0"))
    fresh.load_state_dict(mlp.state_dict())
    assert torch.equal(activity(fresh, "0"), activity(bio, "0"))
    assert all(
        ".bio_mod." in key for key in mlp.load_state_dict(bio.state_dict(), strict=False).unexpected_keys
    )


@pytest.mark.parametrize("channel_axis", [-1, -3])
def test_operator_by_hand(channel_axis: int) -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    channels = x.shape[channel_axis]
    seen = torch.full((channels,), -1.0)
    assert observe_activity(x, seen, True, channel_axis=channel_axis) is x
    expected = torch.stack([x.select(channel_axis, c).abs().mean() for c in range(channels)])
    torch.testing.assert_close(seen, expected)
    observe_activity(3 * x, seen, True, channel_axis=channel_axis)
    torch.testing.assert_close(seen, 0.9 * expected + 0.1 * 3 * expected)
    kept = seen.clone()
    observe_activity(x, seen, False, channel_axis=channel_axis)
    assert torch.equal(seen, kept)


def test_single_vector_is_its_own_mean() -> None:
    seen = torch.full((3,), -1.0)
    observe_activity(torch.tensor([-1.0, 2.0, 0.0]), seen, True, channel_axis=-1)
    assert seen.tolist() == [1.0, 2.0, 0.0]


def test_half_precision_outputs_are_averaged_in_full() -> None:
    seen = torch.full((2,), -1.0)
    x = torch.tensor([[60000.0, 0.5], [60000.0, 0.25]], dtype=torch.float16)
    observe_activity(x, seen, True, channel_axis=-1)
    assert seen.tolist() == [60000.0, 0.375]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("channel_axis", [-1, -3])
def test_empty_batches_and_values_that_are_not_finite_are_not_taken(channel_axis: int, first: bool) -> None:
    x = torch.randn(2, 3, 4, 3, generator=torch.Generator().manual_seed(0))
    seen = torch.full((3,), -1.0)
    if not first:
        observe_activity(x, seen, True, channel_axis=channel_axis)
    kept = seen.clone()
    observe_activity(x[:0], seen, True, channel_axis=channel_axis)
    for spoil in (torch.inf, -torch.inf, torch.nan):
        observe_activity(x * spoil, seen, True, channel_axis=channel_axis)
    assert torch.equal(seen, kept)
    one_bad = x.clone()
    one_bad.select(channel_axis, 1).fill_(torch.inf)
    observe_activity(one_bad, seen, True, channel_axis=channel_axis)
    assert seen[1] == kept[1]
    good = [one_bad.select(channel_axis, channel).abs().mean() for channel in (0, 2)]
    expected = torch.stack(good) if first else 0.9 * kept[[0, 2]] + 0.1 * torch.stack(good)
    torch.testing.assert_close(seen[[0, 2]], expected)
    assert seen.isfinite().all()


def test_config_switches_it_on_for_activity_alone(mlp: nn.Module) -> None:
    for distribution in biofx.Distribution:
        for dynamic in (False, True):
            config = biofx.BioConfig(fuzzy_lr_distribution=distribution, fuzzy_lr_dynamic=dynamic)
            bio, _ = biofx.transform(mlp, config)
            found = len(bio.graph.find_nodes(op="call_function", target=observe_activity))
            assert found == (3 if dynamic and distribution is biofx.Distribution.ACTIVITY else 0)


def test_activity_observation_can_be_overridden_for_a_layer(mlp: nn.Module) -> None:
    config = biofx.BioConfig(fuzzy_lr_dynamic=True).override(
        "2", fuzzy_lr_distribution=biofx.Distribution.ACTIVITY
    )
    bio, report = biofx.transform(mlp, config)
    state = bio.get_submodule("2").bio_mod
    assert isinstance(state, biofx.BioModule)
    assert state.is_dynamic
    assert state.activity is not None
    assert bio.get_submodule("0").bio_mod.activity is None  # type: ignore[union-attr]
    assert "4 units observed behind relu" in str(report)
