from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import biofx
from biofx import capture
from biofx.analysis.synapses import is_synaptic
from biofx.layers import dense_kind_of
from biofx.layers.lowering import Lowering
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import Sites
from biofx.operators.rate_ops import scale_gradient
from biofx.operators.sign_ops import constrain_sign

CONFIG = biofx.BioConfig(
    apply_dales_principle=True, dales_constrain_inputs=True, dales_constrain_readout=True
)


def blockers(sites: Sites) -> dict[str, str | None]:
    return {site.layer: site.value_blocker for site in sites.found}


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnKernel(nn.Conv1d):
    def _conv_forward(self, input: Any, weight: Any, bias: Any) -> Any:
        return super()._conv_forward(input, weight * 2, bias)


class SubclassWithoutForward(nn.Linear):
    pass


def with_hook(register: str) -> nn.Module:
    layer = nn.Linear(4, 4)
    getattr(layer, register)(lambda *given: None)
    return layer


def with_a_forward_of_its_own() -> nn.Module:
    layer = nn.Linear(4, 4)
    vars(layer)["forward"] = torch.relu
    return layer


OBSTACLES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "forward hook": (lambda: with_hook("register_forward_hook"), "it has forward hooks"),
    "forward pre-hook": (lambda: with_hook("register_forward_pre_hook"), "it has forward pre hooks"),
    "backward hook": (lambda: with_hook("register_full_backward_hook"), "it has backward hooks"),
    "backward pre-hook": (lambda: with_hook("register_full_backward_pre_hook"), "it has backward pre hooks"),
    "own forward": (lambda: OwnForward(4, 4), "OwnForward has a forward of its own, not Linear's"),
    "own kernel": (lambda: OwnKernel(4, 4, 1), "OwnKernel has a forward of its own, not Conv1d's"),
    "patched": (with_a_forward_of_its_own, "replaced on the instance"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_a_layer_that_cannot_be_lowered_is_left_alone_with_the_reason(name: str) -> None:
    make, reason = OBSTACLES[name]
    model = nn.Sequential(make(), nn.Linear(4, 4)).eval()
    x = torch.ones(2, 4) if name != "own kernel" else torch.ones(4, 4)
    bio_model, report = biofx.transform(model, passes="scale-gradients", opaque=["0"])
    assert reason in {remark.layer: remark.message for remark in report.remarks}["0"]
    assert bio_model.graph.find_nodes(op="call_module", target="0")
    assert torch.equal(bio_model.eval()(x), model(x))


def test_a_subclass_that_changes_nothing_is_a_layer_like_any_other() -> None:
    sites = find_sites(capture(nn.Sequential(SubclassWithoutForward(4, 4))))
    assert blockers(sites) == {"0": None}


def test_a_computed_weight_still_has_channels() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.ConvTranspose1d(4, 6, 3, groups=2)),
        parametrizations.weight_norm(nn.Conv1d(6, 8, 3, groups=2)),
    )
    first, second = find_sites(capture(model)).found
    assert (first.input_channels, first.output_channels, tuple(first.parameter.shape)) == (4, 6, (4, 3, 3))
    assert (second.input_channels, second.output_channels, tuple(second.parameter.shape)) == (6, 8, (8, 3, 3))


def test_an_output_size_is_an_obstacle() -> None:
    class Upsamples(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 2, 3, stride=2)

        def forward(self, x: Tensor) -> Any:
            return self.up(x, output_size=[8])

    found = blockers(find_sites(capture(Upsamples())))
    assert (
        found["up"] == "it is called with more than its input (output_size), which its function does not take"
    )


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Any:
        return self.head(self.embedding(x))


def test_a_weight_that_something_else_reads_is_an_obstacle_but_to_its_gradient() -> None:
    class Regularised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.fc(x), self.fc.weight.norm()

    sites = find_sites(capture(Regularised()))
    (site,) = sites.found
    assert site.value_blocker == "its weight is also read by 'norm', which would not follow"
    assert site.lowering_blocker is None
    assert [read.parameter_path for read in sites.reads] == ["fc.weight"]


def test_a_tied_embedding_is_another_use_of_the_weight() -> None:
    (weight,) = find_sites(capture(TiedEmbedding())).weights()
    assert weight.path == "embedding.weight"
    assert [site.kind.name for site in weight.sites] == ["Embedding", "Linear"]
    assert [site.value_blocker for site in weight.sites] == [None, None]


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
        self.kernel = nn.Parameter(torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(1)))
        self.back = nn.Parameter(torch.randn(6, 2, 1, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor) -> Any:
        y = F.linear(input=x, weight=self.matrix)
        y = F.conv1d(y[..., None], self.kernel, None, 1, 1, 1, 2)
        return F.conv_transpose1d(y, self.back, groups=2)


def test_a_function_called_with_a_parameter_is_a_site(vectors: Tensor) -> None:
    model = Functional()
    sites = find_sites(capture(model)).found
    assert [site.parameter_path for site in sites] == ["matrix", "kernel", "back"]
    assert [site.groups for site in sites] == [1, 2, 2]
    assert [(site.input_channels, site.output_channels) for site in sites] == [(4, 4), (4, 6), (6, 4)]
    bio_model, report = biofx.transform(model, CONFIG)
    assert {remark.kind for remark in report.remarks} == {"applied"}
    for site in find_sites(bio_model).found:
        assert [node.target for node in site.operators] == [constrain_sign, scale_gradient]
        assert site.has(scale_gradient)
    assert bio_model(vectors).shape == model(vectors).shape
    assert "bio_mod.kernel.sign" in bio_model.state_dict()


def test_a_weight_computed_in_the_graph_is_reported() -> None:
    class Computes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Any:
            return F.linear(x, self.matrix.cumsum(0))

    sites = find_sites(capture(Computes()))
    assert not sites.found
    (layer,) = sites.unsupported
    told = "its weight is cumsum, computed in the graph, not a parameter: cumsum is more than a"
    assert layer.reason == f"{told} sign for each entry"


def test_a_weight_read_by_an_operation_is_an_obstacle() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.fc(x), self.fc.weight.norm()

    (site,) = find_sites(capture(Penalised())).found
    assert site.value_blocker == "its weight is also read by 'norm', which would not follow"


def test_layers_inside_what_is_called_whole_are_reported() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8), nn.GRU(4, 2))
    sites = find_sites(capture(model, opaque=["0"]))
    assert [site.layer for site in sites.found] == ["1", "1"]
    assert {entry.layer for entry in sites.unsupported} == {"0.self_attn", "0.linear1", "0.linear2"}


def test_a_layer_whose_weight_is_used_directly_is_not_called_unused() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            return F.linear(x, self.used.weight, self.used.bias)

    sites = find_sites(capture(Direct()))
    assert [site.layer for site in sites.found] == ["used"]
    assert [(entry.layer, entry.reason) for entry in sites.unsupported] == [
        ("unused", "never called in the forward")
    ]


RECURRENT: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, str, int, int, int, int]]]] = {
    "rnn": (
        lambda: nn.RNN(4, 3, 2),
        [
            ("weight_ih_l0", "input", 0, 0, 4, 3),
            ("weight_hh_l0", "hidden", 0, 0, 3, 3),
            ("weight_ih_l1", "stacked", 1, 0, 3, 3),
            ("weight_hh_l1", "hidden", 1, 0, 3, 3),
        ],
    ),
    "gru": (
        lambda: nn.GRU(4, 3, bidirectional=True, bias=False),
        [
            ("weight_ih_l0", "input", 0, 0, 4, 3),
            ("weight_hh_l0", "hidden", 0, 0, 3, 3),
            ("weight_ih_l0_reverse", "input", 0, 1, 4, 3),
            ("weight_hh_l0_reverse", "hidden", 0, 1, 3, 3),
        ],
    ),
    "lstm": (
        lambda: nn.LSTM(4, 3, 2, proj_size=2),
        [
            ("weight_ih_l0", "input", 0, 0, 4, 3),
            ("weight_hh_l0", "hidden", 0, 0, 2, 3),
            ("weight_hr_l0", "projection", 0, 0, 3, 2),
            ("weight_ih_l1", "stacked", 1, 0, 2, 3),
            ("weight_hh_l1", "hidden", 1, 0, 2, 3),
            ("weight_hr_l1", "projection", 1, 0, 3, 2),
        ],
    ),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_each_weight_of_a_recurrent_layer_is_a_site_with_a_role(name: str) -> None:
    make, expected = RECURRENT[name]
    captured = capture(nn.Sequential(make()))
    hidden = find_sites(captured)
    Lowering(captured).lower(hidden.found[0])
    for sites in (hidden, find_sites(captured)):
        assert not sites.unsupported
        found = [
            (slot.name, site.role, slot.layer, slot.direction, site.input_channels, site.output_channels)
            for site in sites.found
            for slot in [site.slot]
        ]
        assert found == expected
        assert [site.parameter_path for site in sites.found] == [f"0.{name}" for name, *_ in expected]
        assert {site.layer for site in sites.found} == {"0"}
        assert len({site.node for site in sites.found}) == 1
        for site in sites.found:
            weight = site.weight_node
            assert weight is None or weight.target == site.parameter_path


@pytest.mark.parametrize("joint", [True, False])
def test_each_weight_of_an_attention_is_a_site_with_a_role(joint: bool) -> None:
    captured = capture(Attends(nn.MultiheadAttention(6, 2, kdim=None if joint else 4)))
    hidden = find_sites(captured)
    Lowering(captured).lower(hidden.found[0])
    inputs = [("query_key_value", 6, 6)] if joint else [("query", 6, 6), ("key", 4, 6), ("value", 6, 6)]
    for sites in (hidden, find_sites(captured)):
        found = [(site.role, site.input_channels, site.output_channels) for site in sites.found]
        assert found == [*inputs, ("attention_output", 6, 6)]
        assert sites.found[-1].layer == "attention.out_proj"
        assert not sites.unsupported


class Attends(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, query: Tensor, key: Tensor) -> Any:
        return self.attention(query, key, query)[0]


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *given: None)
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: hooked(nn.GRU(4, 4)), "it has forward hooks, which would no longer run"),
        (lambda: hooked(nn.MultiheadAttention(4, 2)), "it has forward hooks, which would no longer run"),
        (lambda: OwnAttention(4, 2), "OwnAttention has a forward of its own, not MultiheadAttention's"),
    ],
)
def test_a_layer_with_several_weights_that_cannot_be_lowered(
    make: Callable[[], nn.Module], reason: str
) -> None:
    layer = make()
    model = Attends(layer) if isinstance(layer, nn.MultiheadAttention) else nn.Sequential(layer)
    path = "attention" if isinstance(layer, nn.MultiheadAttention) else "0"
    sites = find_sites(capture(model, opaque=[path])).found
    assert len(sites) == 2
    assert {site.value_blocker for site in sites} == {reason}
    _, report = biofx.transform(model, passes="scale-gradients", opaque=[path])
    told = {remark.message for remark in report.remarks}
    assert told == {f"{site.slot.name}: {reason}" for site in sites}


def test_a_computed_weight_keeps_the_others_of_its_layer_from_being_lowered() -> None:
    layer = parametrizations.weight_norm(nn.GRU(4, 3), "weight_hh_l0")
    sites = find_sites(capture(nn.Sequential(layer), opaque=["0"]))
    reason = "its weight_hh_l0 is computed by a parametrization, not a parameter"
    assert [(site.slot.name, site.value_blocker) for site in sites.found] == [("weight_ih_l0", reason)]
    assert [entry.reason for entry in sites.unsupported] == [f"weight_hh_l0: {reason}"]


def test_a_recurrent_weight_that_something_else_reads_is_an_obstacle_for_it_alone() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.RNN(4, 4)

        def forward(self, x: Tensor) -> Any:
            return self.cell(x)[0], self.cell.weight_hh_l0.norm()  # type: ignore[operator]

    first, second = find_sites(capture(Penalised())).found
    assert first.value_blocker is None
    assert second.value_blocker == "its weight is also read by 'norm', which would not follow"


def test_a_weight_that_is_its_own_input_is_an_obstacle() -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.eye(4))

        def forward(self, x: Tensor) -> Any:
            return x + F.linear(self.matrix, self.matrix)

    (site,) = find_sites(capture(Squares())).found
    assert site.value_blocker == "its weight is also read by 'linear', which would not follow"


def test_layers_with_several_weights_that_are_never_called_are_reported_once() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.attention = nn.GRU(4, 4), nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Any:
            return x

    sites = find_sites(capture(Spare()))
    assert not sites.found
    assert [(entry.layer, entry.reason) for entry in sites.unsupported] == [
        ("cell", "never called in the forward"),
        ("attention", "never called in the forward"),
    ]


def test_frozen_recurrent_weights_are_left_alone() -> None:
    model = nn.Sequential(nn.RNN(4, 4))
    model.get_parameter("0.weight_hh_l0").requires_grad_(False)
    bio_model, report = biofx.transform(model, passes="scale-gradients")
    told = {remark.message.partition(":")[0]: remark.kind for remark in report.remarks}
    assert told == {"weight_ih_l0": "applied", "weight_hh_l0": "missed"}
    assert len(bio_model.graph.find_nodes(op="call_function", target=scale_gradient)) == 1


@pytest.mark.parametrize("name", ["split-weights", "observe-activity"])
def test_passes_over_channels_say_why_they_leave_a_recurrent_layer_alone(name: str) -> None:
    model = nn.Sequential(nn.RNN(4, 4))
    bio_model, report = biofx.transform(model, passes=name)
    assert not report.modified
    assert bio_model.graph.find_nodes(op="call_module", target="0")
    assert [remark.message.partition(";")[0] for remark in report.remarks] == [
        "weight_ih_l0: RNN returns more than this weight's output",
        "weight_hh_l0: RNN returns more than this weight's output",
    ]


def test_weights_are_ordered_by_first_use_and_gather_their_sites() -> None:
    class Weaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late, self.early, self.middle = (nn.Linear(4, 4) for _ in range(3))
            self.twin = nn.Linear(4, 4)
            self.twin.weight = self.early.weight

        def forward(self, x: Tensor) -> Any:
            return self.late(self.twin(self.middle(self.early(x))))

    weights = find_sites(capture(Weaves())).weights()
    assert [(weight.path, len(weight.sites), weight.depth) for weight in weights] == [
        ("early.weight", 2, 0.0),
        ("middle.weight", 1, 0.5),
        ("late.weight", 1, 1.0),
    ]


@pytest.mark.parametrize(
    ("module", "synaptic"),
    [
        (nn.Linear(2, 2), True),
        (nn.Embedding(2, 2), True),
        (nn.GRU(2, 2), True),
        (nn.LayerNorm((2, 2)), False),
        (nn.BatchNorm1d(2), False),
        (nn.PReLU(), False),
        (nn.Dropout(), False),
    ],
)
def test_what_carries_weights_between_units_is_synaptic(module: nn.Module, synaptic: bool) -> None:
    captured = capture(nn.Sequential(module))
    (node,) = captured.graph.find_nodes(op="call_module")
    assert is_synaptic(node, captured) is synaptic


def test_a_layer_is_known_by_its_class() -> None:
    kind = dense_kind_of(SubclassWithoutForward(2, 2))
    assert kind is not None
    assert kind.name == "Linear"
    assert dense_kind_of(nn.Bilinear(2, 2, 2)) is None
