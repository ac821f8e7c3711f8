from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx import BioConfig, CaptureError, OptionError, passes
from biofx.errors import InputError, PipelineError, SelectorError

Unchanged = Callable[[nn.Module], Any]
EVERYTHING = BioConfig(
    weight_splitting_Gamma=2,
    apply_dales_principle=True,
    dales_constrain_inputs=True,
    dales_constrain_readout=True,
    fuzzy_lr_min=0.1,
)
OFF = BioConfig(fuzzy_lr_distribution=biofx.Distribution.BASELINE)


def numpy_state() -> bytes:
    state: Any = numpy.random.get_state()
    return bytes(state[1].tobytes())


def messages(report: biofx.Report) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for remark in report.remarks:
        found.setdefault(remark.layer, []).append(f"{remark.kind}: {remark.message}")
    return found


def run_backward(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    torch.manual_seed(3)
    model(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_the_model_that_goes_in_is_never_modified(residual_net: nn.Module, unchanged: Unchanged) -> None:
    residual_net.get_submodule("conv").register_forward_hook(lambda module, args, output: None)
    residual_net.get_parameter("fc.weight").grad = torch.ones(10, 4)
    hooks = {path: dict(module._forward_hooks) for path, module in residual_net.named_modules()}
    attributes = {path: dict(vars(module)) for path, module in residual_net.named_modules()}
    states = random.getstate(), numpy_state()
    with unchanged(residual_net):
        assert biofx.transform(residual_net, EVERYTHING).modified
    assert random.getstate() == states[0]
    assert numpy_state() == states[1]
    assert torch.is_grad_enabled()
    assert torch.equal(residual_net.get_parameter("fc.weight").grad, torch.ones(10, 4))  # type: ignore[arg-type]
    for path, module in residual_net.named_modules():
        assert dict(module._forward_hooks) == hooks[path]
        assert {name: id(value) for name, value in vars(module).items()} == {
            name: id(value) for name, value in attributes[path].items()
        }


def test_the_result_shares_no_tensor_with_the_model(residual_net: nn.Module) -> None:
    bio_model = biofx.transform(residual_net, EVERYTHING).graph_module
    storages = {t.data_ptr() for t in (*residual_net.parameters(), *residual_net.buffers())}
    assert not storages & {t.data_ptr() for t in (*bio_model.parameters(), *bio_model.buffers())}


def test_parameters_are_shared_if_asked_for_and_buffers_are_not(
    residual_net: nn.Module, images: Tensor
) -> None:
    kept = EVERYTHING.replace(dales_initialisation="keep")
    bio_model = biofx.transform(residual_net, kept, share_parameters=True).graph_module
    for name, parameter in residual_net.named_parameters():
        assert bio_model.get_parameter(name) is parameter
    before = residual_net.get_buffer("bn.running_mean").clone()
    bio_model(images)
    assert torch.equal(residual_net.get_buffer("bn.running_mean"), before)


def test_keys_and_order_are_kept_and_extra_keys_lie_under_bio_mod(residual_net: nn.Module) -> None:
    bio_model = biofx.transform(residual_net, EVERYTHING).graph_module
    keys = [name for name in bio_model.state_dict() if "bio_mod" not in name.split(".")]
    assert keys == list(residual_net.state_dict())
    assert len(keys) < len(bio_model.state_dict())
    assert [n for n, _ in bio_model.named_parameters()] == [n for n, _ in residual_net.named_parameters()]


def test_a_plain_checkpoint_loads_into_the_result_and_back(residual_net: nn.Module, images: Tensor) -> None:
    bio_model = biofx.transform(residual_net, EVERYTHING).graph_module
    state = {name: value for name, value in bio_model.state_dict().items() if "bio_mod" in name}
    kept = copy.deepcopy(state)
    trained = {name: value + 1 for name, value in residual_net.state_dict().items()}
    bio_model.load_state_dict(trained, strict=True)
    for name, value in trained.items():
        assert torch.equal(bio_model.state_dict()[name], value), name
    for name, value in kept.items():
        assert torch.equal(bio_model.state_dict()[name], value), name
    plain = {name: value for name, value in bio_model.state_dict().items() if "bio_mod" not in name}
    residual_net.load_state_dict(plain, strict=True)
    off = biofx.transform(residual_net, OFF).graph_module
    assert torch.equal(off.eval()(images), residual_net.eval()(images))


@pytest.mark.parametrize("training", [True, False])
def test_with_everything_off_nothing_differs_to_the_bit(
    residual_net: nn.Module, images: Tensor, training: bool
) -> None:
    bio_model, report = biofx.transform(residual_net.train(training), OFF)
    assert not report.modified
    assert bio_model.training is training
    torch.testing.assert_close(
        run_backward(bio_model, images), run_backward(residual_net, images), rtol=0, atol=0
    )
    torch.testing.assert_close(dict(bio_model.named_buffers()), dict(residual_net.named_buffers()))


def test_a_layer_called_twice_is_rewritten_at_both_calls_and_has_one_state(vectors: Tensor) -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 2))
    bio_model, report = biofx.transform(model, EVERYTHING)
    applied = [remark.node for remark in report.passes[-1].remarks if remark.kind == "applied"]
    assert applied == ["_0", "_0_pooled", "_0_1", "_0_1_pooled", "_4"]
    assert sum(name.endswith("0.bio_mod.sign") for name in bio_model.state_dict()) == 1
    assert "one set for 2 uses of the weight" in " ".join(messages(report)["0"])
    scaled = biofx.transform(model, passes="scale-gradients").graph_module
    factors = scaled.get_buffer("0.bio_mod.fuzzy_learning_rate_parameters")
    found, expected = run_backward(scaled, vectors)["0.weight"], run_backward(model, vectors)["0.weight"]
    assert expected is not None
    torch.testing.assert_close(found, expected * factors)


class TiedLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Any:
        return self.decode(torch.relu(self.encode(x)))


def test_two_layers_with_one_weight_keep_one_and_are_scaled_once(vectors: Tensor) -> None:
    model = TiedLinears()
    bio_model, report = biofx.transform(model, passes="scale-gradients")
    assert bio_model.get_parameter("encode.weight") is bio_model.get_parameter("decode.weight")
    assert {remark.kind for remark in report.remarks} == {"applied"}
    factors = bio_model.get_buffer("encode.bio_mod.fuzzy_learning_rate_parameters")
    found, expected = (run_backward(m, vectors)["encode.weight"] for m in (bio_model, model))
    assert expected is not None
    torch.testing.assert_close(found, expected * factors)
    assert not any(name.startswith("decode.bio_mod") for name in bio_model.state_dict())


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Any:
        return self.head(self.embedding(x))


def test_a_weight_tied_to_an_embedding_has_one_factor_and_no_sign() -> None:
    model = TiedEmbedding()
    bio_model, report = biofx.transform(
        model, passes="scale-gradients,constrain-signs{constrain_readout=true}"
    )
    assert [(entry.applied, entry.missed) for entry in report.passes] == [(0, 2), (2, 0)]
    assert "its weight is also read by 'embedding', where signs mean nothing" in str(report)
    assert bio_model.get_parameter("head.weight") is bio_model.get_parameter("embedding.weight")
    x = torch.tensor([[1, 2, 2], [4, 0, 1]])
    for net in (model, bio_model):
        (net(x) ** 2).sum().backward()
    plain, found = model.embedding.weight.grad, bio_model.get_parameter("embedding.weight").grad
    assert plain is not None
    assert found is not None
    factors = bio_model.get_buffer("embedding.bio_mod.fuzzy_learning_rate_parameters")
    assert torch.equal(found, plain * factors)


def test_a_frozen_weight_stays_frozen_and_is_reported(mlp: nn.Module) -> None:
    mlp.get_parameter("2.weight").requires_grad_(False)
    bio_model, report = biofx.transform(mlp, passes="scale-gradients")
    assert messages(report)["2"] == ["missed: its weight is frozen (requires_grad is False)"]
    assert not bio_model.get_parameter("2.weight").requires_grad
    assert not any(name.startswith("2.bio_mod") for name in bio_model.state_dict())


def test_a_layer_without_bias_is_rewritten_without_one(mlp: nn.Module, vectors: Tensor) -> None:
    bio_model, report = biofx.transform(mlp, passes="scale-gradients")
    assert messages(report)["2"][0].startswith("applied")
    (site,) = (node for node in bio_model.graph.nodes if node.name == "_2")
    assert site.target is F.linear
    assert len(site.args) == 2
    assert torch.equal(bio_model(vectors), mlp(vectors))


class HasAnUnusedLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return self.used(x)


def test_an_unused_layer_is_kept_and_reported() -> None:
    model = HasAnUnusedLayer()
    bio_model, report = biofx.transform(model, passes="scale-gradients")
    assert messages(report)["unused"] == ["missed: never called in the forward"]
    assert "unused.weight" in bio_model.state_dict()


@pytest.mark.parametrize("selection", [{"only": []}, {"exclude": ["0", "2", "4"]}])
def test_an_empty_selection_changes_nothing_and_says_so(mlp: nn.Module, selection: dict[str, Any]) -> None:
    _, report = biofx.transform(mlp, passes="scale-gradients,constrain-signs", **selection)
    assert not report.modified
    assert {remark.layer for remark in report.remarks} == {"0", "2", "4"}
    assert {remark.kind for remark in report.remarks} == {"missed"}


@pytest.mark.parametrize("selection", [{"only": "layer9"}, {"exclude": "type:Conv2d"}, {"only": "0#3"}])
def test_a_selector_that_matches_nothing_is_an_error(
    mlp: nn.Module, selection: dict[str, Any], unchanged: Unchanged
) -> None:
    with unchanged(mlp), pytest.raises(SelectorError):
        biofx.transform(mlp, EVERYTHING, **selection)


def test_a_model_without_layers_changes_nothing() -> None:
    _, report = biofx.transform(nn.Sequential(nn.ReLU()), EVERYTHING)
    assert not report.modified
    assert not report.remarks


def test_a_transformed_model_is_not_transformed_again(residual_net: nn.Module, images: Tensor) -> None:
    first = biofx.transform(residual_net, EVERYTHING).graph_module
    second, report = biofx.transform(first, EVERYTHING)
    assert not report.modified
    assert biofx.format_graph(second) == biofx.format_graph(first)
    assert list(second.state_dict()) == list(first.state_dict())
    reasons = [remark.message for remark in report.remarks]
    done = ("already", "output layer", "neither its inputs nor its outputs")
    assert all(any(words in reason for words in done) for reason in reasons), reasons
    torch.testing.assert_close(run_backward(second, images), run_backward(first, images), rtol=0, atol=0)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        if x.mean() > 0:
            return self.fc(x)
        return x


def test_untraceable_code_is_named_by_module_file_and_line(unchanged: Unchanged) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"gate": Untraceable()})["gate"])
    place = r"module '1' \(Untraceable\), .*test_transform\.py:\d+ \(if x\.mean\(\) > 0:\)"
    with unchanged(model), pytest.raises(CaptureError, match=place):
        biofx.transform(model, EVERYTHING, regions=False)
    with unchanged(model):
        _, report = biofx.transform(model, EVERYTHING)
    assert report.coverage is not None
    assert re.search(place, report.coverage.kept["1"])


def test_a_gamma_that_divides_nothing_is_an_error_and_one_that_divides_something_is_not(
    mlp: nn.Module, unchanged: Unchanged
) -> None:
    with unchanged(mlp), pytest.raises(OptionError, match=r"divides none: 0 has 6, 2 has 4"):
        biofx.transform(mlp, {"weight_splitting_Gamma": 5}, passes="split-weights")
    _, report = biofx.transform(mlp, {"weight_splitting_Gamma": 3}, passes="split-weights")
    assert messages(report)["0"][0].startswith("applied")
    (message,) = messages(report)["2"]
    assert message.startswith(
        "missed: Γ does not divide its 4 output channels (gamma=3, in a config weight_splitting_Gamma); "
    )


BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"config": 3}, OptionError, "a BioConfig or a dict"),
    ({"config": {"weight_spliting_Gamma": 2}}, OptionError, "weight_splitting_Gamma"),
    ({"passes": "split-weigths"}, PipelineError, "split-weights"),
    ({"passes": "split-weights{gamma=2"}, PipelineError, "malformed"),
    ({"passes": "split-weights{gama=2}"}, OptionError, "gamma"),
    ({"config": BioConfig().override("layer9", weight_splitting_Gamma=2)}, SelectorError, "layer9"),
    ({"opaque": ["layer9"]}, InputError, "layer9"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD_CALLS)
def test_a_bad_call_is_one_clear_error_and_leaves_the_model_alone(
    mlp: nn.Module, unchanged: Unchanged, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with unchanged(mlp), pytest.raises(error, match=message):
        biofx.transform(mlp, **given)


class FailsHalfway(passes.ScaleGradients):
    name = "fails-halfway"

    def rewrite_node(self, candidate: Any, options: Any) -> Any:
        if candidate.weight.path == "4.weight":
            raise RuntimeError("halfway")
        yield from super().rewrite_node(candidate, options)


def test_a_pass_that_fails_leaves_nothing_half_done(mlp: nn.Module, unchanged: Unchanged) -> None:
    captured = biofx.capture(mlp)
    before = biofx.format_graph(captured)
    with unchanged(mlp), pytest.raises(RuntimeError, match="halfway"):
        biofx.transform(mlp, passes=FailsHalfway(), share_parameters=True)
    assert not any("bio_mod" in name for name, _ in mlp.named_modules())
    with unchanged(captured), pytest.raises(RuntimeError, match="halfway"):
        FailsHalfway()(captured)
    assert biofx.format_graph(captured) == before


def test_a_config_is_given_as_a_record_a_dict_or_not_at_all(mlp: nn.Module) -> None:
    fields = {"weight_splitting_Gamma": 2, "fuzzy_lr_distribution": "baseline"}
    from_dict = biofx.transform(mlp, fields)
    from_record = biofx.transform(mlp, BioConfig.from_dict(fields))
    assert biofx.format_graph(from_dict.graph_module) == biofx.format_graph(from_record.graph_module)
    assert [entry.name for entry in from_dict.report.passes] == ["split-weights", "fold-splits"]
    assert [entry.name for entry in biofx.transform(mlp).report.passes] == ["scale-gradients"]


def test_only_is_an_intersection_with_what_a_pass_selects_itself(mlp: nn.Module) -> None:
    _, report = biofx.transform(mlp, passes=passes.ScaleGradients(only=["0", "2"]), only=["2", "4"])
    assert [remark.layer for remark in report.remarks if remark.kind == "applied"] == ["2"]


def test_an_observer_sees_each_pass_that_changed_the_graph(mlp: nn.Module) -> None:
    seen: list[str] = []
    biofx.transform(
        mlp,
        passes="split-weights,split-weights,scale-gradients",
        observe=lambda name, before, after: seen.append(name),
    )
    assert seen == ["split-weights", "scale-gradients"]


def test_a_config_seed_gives_the_same_model_again(mlp: nn.Module) -> None:
    first, second = (biofx.transform(mlp, EVERYTHING).graph_module for _ in range(2))
    other = biofx.transform(mlp, EVERYTHING.replace(seed=1)).graph_module
    key = "0.bio_mod.fuzzy_learning_rate_parameters"
    assert torch.equal(first.state_dict()[key], second.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


class Plain(nn.Module):
    """A parameter used by a function, in a submodule that holds nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight)


def test_a_weight_of_the_model_itself_has_its_state_in_the_model(vectors: Tensor) -> None:
    bio_model = biofx.transform(Plain(), passes="scale-gradients").graph_module
    assert list(bio_model.state_dict()) == [
        *("weight", "bio_mod.fuzzy_learning_rate_parameters", "bio_mod._extra_state")
    ]
    found = run_backward(bio_model, vectors)["weight"]
    expected = run_backward(Plain(), vectors)["weight"]
    assert expected is not None
    torch.testing.assert_close(
        found, expected * bio_model.get_buffer("bio_mod.fuzzy_learning_rate_parameters")
    )
