from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.errors import OptionError
from biofx.layers.weight_site import WeightSite
from biofx.operators.mask_ops import mask_weight
from biofx.passes import ConstrainSigns, ExpandUnits, MaskWeights, ScaleGradients

OFF: dict[str, Any] = {"fuzzy_lr_distribution": "baseline"}


def masked(model: nn.Module, **options: Any) -> biofx.PassResult:
    return biofx.transform(model, passes=MaskWeights(**options))


def mask_of(bio: nn.Module, path: str) -> Tensor:
    """The mask of a weight."""
    owner, _, name = path.rpartition(".")
    place = f"{owner}.bio_mod" if name == "weight" else f"{owner}.bio_mod.{name}"
    return bio.get_buffer(f"{place}.connection_mask")


def effective(bio: nn.Module, path: str) -> Tensor:
    """A weight by definition: itself where a connection exists, else 0."""
    weight = bio.get_parameter(path).detach()
    return torch.where(mask_of(bio, path) == 1, weight, torch.zeros(()))


def by_hand(bio: nn.Module, x: Tensor) -> Tensor:
    """What the network of the fixture computes, from effective weights."""
    y = F.relu(F.linear(x, effective(bio, "0.weight"), bio.get_parameter("0.bias")))
    y = F.relu(F.linear(y, effective(bio, "2.weight")))
    return F.linear(y, effective(bio, "4.weight"), bio.get_parameter("4.bias"))


def reasons(report: biofx.Report) -> dict[str, str]:
    return {remark.layer: remark.message for remark in report.remarks if remark.kind == "missed"}


def test_graph_and_report(residual_net: nn.Module, golden: Callable[[str, str], None]) -> None:
    bio, report = masked(residual_net, density=0.25)
    golden("mask_weights", f"{biofx.format_graph(bio)}\n\n{report}")


def test_a_graph_that_grows_by_gradient_reads_a_probe(
    mlp: nn.Module, golden: Callable[[str, str], None]
) -> None:
    config = biofx.BioConfig(weight_density=0.5, rejuvenation_growth="gradient", apply_dales_principle=True)
    bio, report = biofx.transform(mlp, config.override("4", dales_constrain_readout=True))
    golden("mask_weights_and_signs", f"{biofx.format_graph(bio)}\n\n{report}")


# what it computes


def test_output_and_gradients_are_those_of_the_definition(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = masked(mlp, density=0.5)
    with torch.no_grad():
        for parameter in bio.parameters():
            parameter.normal_()
    output = bio(vectors)
    torch.testing.assert_close(output, by_hand(bio, vectors), rtol=0, atol=0)
    output.square().sum().backward()
    plain = copy.deepcopy(mlp)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            has_mask = name.endswith("weight")
            parameter.copy_(effective(bio, name) if has_mask else bio.get_parameter(name))
    plain(vectors).square().sum().backward()
    for name, parameter in plain.named_parameters():
        gradient: Any = bio.get_parameter(name).grad
        if not name.endswith("weight"):
            assert torch.equal(gradient, parameter.grad)  # type: ignore[arg-type]
            continue
        exists = mask_of(bio, name) == 1
        assert torch.equal(gradient, torch.where(exists, parameter.grad, 0))  # type: ignore[arg-type]
        assert not exists.all()


def test_nothing_is_left_of_what_a_missing_connection_holds(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = masked(mlp, density=0.5)
    expected = bio(vectors)
    with torch.no_grad():
        for path, wrong in (("0.weight", torch.nan), ("2.weight", -torch.inf)):
            weight = bio.get_parameter(path)
            weight[mask_of(bio, path) != 1] = wrong
    assert torch.equal(bio(vectors), expected)
    bio(vectors).sum().backward()
    for path in ("0.weight", "2.weight"):
        gradient: Any = bio.get_parameter(path).grad
        assert torch.equal(gradient[mask_of(bio, path) != 1], torch.zeros(12))
        assert gradient.isfinite().all()


@pytest.mark.parametrize("values", [(1.0, 0.0, -1.0), (0.75, 0.4, -0.9)], ids=["exact", "averaged"])
def test_a_mask_says_by_its_sign_and_size_what_exists(values: tuple[float, ...]) -> None:
    weight = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    result = mask_weight(weight, torch.tensor(values))
    assert result.tolist() == [1, 0, 0]
    result.backward(torch.tensor([5.0, 6.0, 7.0]))
    assert weight.grad is not None
    assert weight.grad.tolist() == [5, 0, 0]


def test_double_backward_and_half_precision_follow_the_definition() -> None:
    mask = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    weight = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda w: mask_weight(w, mask).pow(3), (weight,))
    half = torch.tensor([[1.5, 2.0], [3.0, 4.0]], dtype=torch.bfloat16)
    assert mask_weight(half, mask).tolist() == [[1.5, 0], [0, 4]]
    assert mask_weight(half, mask).dtype == torch.bfloat16


# which connections exist


@pytest.mark.parametrize(
    ("density", "shape"), [(0.1, (50, 33)), (0.3, (7, 10)), (0.5, (4, 5)), (0.9, (8, 8))]
)
def test_the_count_of_a_layer_is_exact_and_units_have_equally_many(
    density: float, shape: tuple[int, int]
) -> None:
    bio, report = masked(nn.Sequential(nn.Linear(shape[1], shape[0])), density=density)
    exists = mask_of(bio, "0.weight") == 1
    assert (
        int(exists.sum()) == round(density * shape[0] * shape[1]) == report.remarks[0].details["connections"]
    )
    each = exists.sum(1)
    assert int(each.max()) - int(each.min()) <= 1
    assert each.min() == report.remarks[0].details["fewest"]
    assert each.max() == report.remarks[0].details["most"]


def test_every_unit_keeps_at_least_one_connection() -> None:
    bio, report = masked(nn.Sequential(nn.Linear(3, 40)), density=0.05)
    assert (mask_of(bio, "0.weight") == 1).sum(1).tolist() == [1] * 40
    assert report.remarks[0].details["connections"] == 40


def test_connections_are_chosen_evenly_and_from_seed_and_path() -> None:
    layers = nn.Sequential(*(nn.Linear(20, 20) for _ in range(200)))
    bio, _ = masked(layers, density=0.25)
    masks = torch.stack([(mask_of(bio, f"{number}.weight") == 1).float() for number in range(200)])
    # each of 400 places is taken in 200 independent draws: a binomial with standard deviation 0.031
    assert (masks.mean(0) - 0.25).abs().max() < 5 * 0.031
    assert not torch.equal(masks[0], masks[1])
    again, _ = masked(layers, density=0.25)
    assert torch.equal(mask_of(again, "7.weight"), mask_of(bio, "7.weight"))
    other, _ = masked(layers, density=0.25, seed=1)
    assert not torch.equal(mask_of(other, "7.weight"), mask_of(bio, "7.weight"))


def test_initial_weights_keep_the_variance_of_each_unit() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(400, 300)
    bio, report = masked(nn.Sequential(layer), density=0.1)
    x = torch.randn(500, 400)
    plain, sparse = layer(x).detach(), bio(x).detach()
    bias = layer.bias.detach()
    ratio = (sparse - bias).square().mean().sqrt() / (plain - bias).square().mean().sqrt()
    # 300 · 500 correlated samples of a variance: its relative standard error is below 0.02
    assert abs(float(ratio) - 1) < 0.04
    exists = mask_of(bio, "0.weight") == 1
    held = bio.get_parameter("0.weight").detach()
    expected = torch.where(exists, layer.weight.detach() * (400 / 40) ** 0.5, 0)
    torch.testing.assert_close(held, expected)
    assert report.remarks[0].message.endswith("40 of 400 for each unit, and multiplied by 3.16")
    kept, report = masked(nn.Sequential(layer), density=0.1, initialisation="keep")
    assert "multiplied" not in report.remarks[0].message
    assert torch.equal(kept.get_parameter("0.weight"), torch.where(exists, layer.weight, 0))


def test_areas_connect_with_their_own_densities() -> None:
    blocks = [[0.5, 0.0], [0.1, 1.0]]
    model = nn.Sequential(nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 50))
    bio, report = biofx.transform(
        model,
        biofx.BioConfig(**OFF)
        .override("0", weight_mask_blocks=blocks, weight_mask_areas=[[40, 10], [30, 10]])
        .override("2", weight_mask_blocks=blocks, weight_mask_areas=[40, 10]),
    )
    for path, inputs in (("0.weight", 30), ("2.weight", 40)):
        mask = mask_of(bio, path)
        parts = [[mask[:40, :inputs], mask[:40, inputs:]], [mask[40:, :inputs], mask[40:, inputs:]]]
        for row in range(2):
            for column in range(2):
                part = parts[row][column]
                assert int((part == 1).sum()) == round(blocks[row][column] * part.numel())
                assert bool((part == -1).all()) == (blocks[row][column] == 0)
    assert report.remarks[0].details["forbidden"] == 40 * 10


def test_areas_of_equal_size_need_no_sizes_and_density_multiplies() -> None:
    bio, _ = masked(nn.Sequential(nn.Linear(8, 6)), density=0.5, blocks=[[1, 0], [0.5, 1]])
    mask = mask_of(bio, "0.weight")
    assert [int((part == 1).sum()) for part in (mask[:3, :4], mask[:3, 4:], mask[3:, :4], mask[3:, 4:])] == [
        *(6, 0, 3, 6)
    ]


@pytest.mark.parametrize(
    ("given", "as_rows"),
    [
        ("110 011", "110 011"),
        ([[1, 1, 0], [0, 1, 1]], "110 011"),
        (torch.tensor([[True, True, False], [False, True, True]]), "110 011"),
        (torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]).numpy(), "110 011"),
    ],
)
def test_a_mask_of_the_users_may_be_given_in_many_forms(given: Any, as_rows: str) -> None:
    config = biofx.BioConfig(**OFF).override("0", weight_mask=given)
    assert dict(config.overrides[0].options) == {"weight_mask": as_rows}
    bio, report = biofx.transform(nn.Sequential(nn.Linear(3, 2)), config)
    assert mask_of(bio, "0.weight").tolist() == [[1, 1, -1], [-1, 1, 1]]
    again, _ = biofx.transform(nn.Sequential(nn.Linear(3, 2)), passes=report.passes[0].text)
    assert torch.equal(mask_of(again, "0.weight"), mask_of(bio, "0.weight"))


def test_a_tensor_of_other_numbers_is_no_mask() -> None:
    with pytest.raises(OptionError, match=r"expected rows of 0 and 1 .* found a Tensor of others"):
        biofx.BioConfig().override("0", weight_mask=torch.full((2, 2), 0.5))


def test_density_counts_within_a_mask_of_the_users() -> None:
    given = torch.eye(10).repeat(1, 4)
    bio, _ = masked(nn.Sequential(nn.Linear(40, 10)), density=0.5, mask=given)
    mask = mask_of(bio, "0.weight")
    assert torch.equal(mask == -1, given == 0)
    assert (mask == 1).sum(1).tolist() == [2] * 10


def test_a_mask_of_channels_holds_for_whole_kernels_and_one_of_elements_for_elements() -> None:
    layer = nn.Conv2d(2, 3, 2)
    channels = torch.tensor([[1, 0], [1, 1], [0, 1]])
    bio, _ = masked(nn.Sequential(layer), mask=channels)
    assert torch.equal(mask_of(bio, "0.weight") == 1, channels[:, :, None, None].expand(3, 2, 2, 2) == 1)
    elements = torch.rand(3, 2, 2, 2) < 0.5
    bio, _ = masked(nn.Sequential(layer), mask=elements)
    assert torch.equal(mask_of(bio, "0.weight") == 1, elements)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.ConvTranspose2d(4, 6, 3),
        nn.ConvTranspose2d(4, 6, 3, groups=2),
    ],
)
def test_units_of_convolutions_have_equally_many_connections(layer: Any) -> None:
    bio, _ = masked(nn.Sequential(layer), density=0.3)
    exists = (mask_of(bio, "0.weight") == 1).float()
    # how many connections each output has: a convolution of ones with the mask, where the kernel fits
    function = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d}.get(type(layer), F.conv_transpose2d)
    ones = torch.ones(1, 4, *(3 if function is not F.conv_transpose2d else 7,) * (layer.weight.dim() - 2))
    counts = function(ones, exists, groups=layer.groups)[0].flatten(1)
    each = counts[:, counts.shape[1] // 2]
    assert int(each.max()) - int(each.min()) <= 1
    assert int(exists.sum()) == round(0.3 * exists.numel())


@pytest.mark.parametrize(("layer", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
def test_a_connection_of_a_recurrent_layer_has_all_gates_and_may_not_lead_to_itself(
    layer: Any, gates: int
) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = layer(3, 8)
            self.out = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])  # type: ignore[no-any-return]

    model = Recurrent()
    bio, report = masked(model, density=0.5, self_connections=False)
    for path, inputs in (("rnn.weight_ih_l0", 3), ("rnn.weight_hh_l0", 8)):
        each = mask_of(bio, path).reshape(gates, 8, inputs)
        assert (each == each[0]).all()
    hidden = mask_of(bio, "rnn.weight_hh_l0")[:8]
    assert torch.equal(hidden == -1, torch.eye(8) == 1)
    assert int((hidden == 1).sum()) == 28
    assert not (mask_of(bio, "out.weight") == -1).any()
    assert "none of 8 self-connections" in report.remarks[1].message
    x = torch.randn(5, 2, 3)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for path in ("rnn.weight_ih_l0", "rnn.weight_hh_l0", "out.weight"):
            plain.get_parameter(path).copy_(effective(bio, path))
    torch.testing.assert_close(bio(x), plain(x))


def test_self_connections_of_a_loop_are_found_by_who_reads_whom() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.recur, self.leave = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.enter(x))
            for _ in range(3):
                h = torch.relu(self.enter(x) + self.recur(h))
            return self.leave(h)  # type: ignore[no-any-return]

    bio, report = masked(Loop(), self_connections=False)
    assert torch.equal(mask_of(bio, "recur.weight") == -1, torch.eye(6) == 1)
    assert set(reasons(report)) == {"enter", "leave"}
    held = bio.get_parameter("recur.weight")
    assert torch.equal(held.diagonal(), torch.zeros(6))


class Rates(nn.Module):
    """A network of rates with a leak, in a loop over time of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.recur, self.leave = nn.Linear(3, 20), nn.Linear(20, 20), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        state, out = x.new_zeros(x.shape[1], 20), []
        for number in range(x.shape[0]):
            state = 0.8 * state + 0.2 * (self.recur(torch.relu(state)) + self.enter(x[number]))
            out.append(self.leave(torch.relu(state)))
        return torch.stack(out)


def test_a_loop_in_python_has_no_self_connections_where_example_inputs_show_who_reads_whom() -> None:
    model, x = Rates(), torch.randn(5, 4, 3)
    options: dict[str, Any] = {**OFF, "apply_dales_principle": True}
    config = biofx.BioConfig(**options).override(
        "recur", weight_density=0.5, weight_mask_self_connections=False
    )
    bio, _ = biofx.transform(model, config, example_inputs=((x,), {}))
    mask = mask_of(bio, "recur.weight")
    assert torch.equal(mask == -1, torch.eye(20) == 1)
    assert int((mask == 1).sum()) == 190
    optimizer = torch.optim.AdamW(bio.parameters(), lr=0.01)
    biofx.attach(bio, optimizer, [biofx.Rule("rejuvenate_weights", every=2)])
    for length in (5, 3, 7, 5):
        optimizer.zero_grad()
        bio(torch.randn(length, 4, 3)).square().mean().backward()
        optimizer.step()
        assert int((mask == 1).sum()) == 190
        assert torch.equal(mask == -1, torch.eye(20) == 1)
    used = biofx.deploy(bio).get_parameter("recur.weight")
    assert torch.equal(used.diagonal(), torch.zeros(20))
    assert (used * bio.get_submodule("recur").bio_mod.presynaptic_signs() >= 0).all()  # type: ignore[operator, union-attr]


def test_self_connections_that_cannot_be_told_are_left_alone() -> None:
    class Undecided(Rates):
        def forward(self, x: Tensor) -> Tensor:
            state = torch.relu(self.enter(x))
            while float(state.sum()) < 1e-9:
                state = state + torch.relu(self.recur(state))
            return self.leave(state)  # type: ignore[no-any-return]

    _, report = masked(Undecided(), density=0.5, self_connections=False)
    assert reasons(report)["recur"].endswith("so self-connections cannot be told (give example_inputs)")


def test_query_key_and_value_have_connections_of_their_own() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]  # type: ignore[no-any-return]

    bio, _ = masked(Attention(), density=0.25)
    mask = mask_of(bio, "attention.in_proj_weight")
    assert (mask == 1).sum(1).tolist() == [2] * 24
    assert not torch.equal(mask[:8], mask[8:16])
    assert int((mask_of(bio, "attention.out_proj.weight") == 1).sum()) == 16


# what is left alone, or refused


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))) + self.first.weight.sum()  # type: ignore[no-any-return]


def test_a_tied_weight_has_one_mask_wherever_it_is_used() -> None:
    bio, report = masked(Tied(), density=0.5)
    assert report.passes[0].missed == 0
    assert len(bio.graph.find_nodes(op="call_function", target=mask_weight)) == 1
    x = torch.randn(3, 4)
    weight = effective(bio, "first.weight")
    hidden = torch.relu(F.linear(x, weight, bio.get_parameter("first.bias")))
    expected = F.linear(hidden, weight, bio.get_parameter("second.bias")) + weight.sum()
    torch.testing.assert_close(bio(x), expected)


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.fc.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.table(x))  # type: ignore[no-any-return]


def hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, args, output: output)
    return nn.Sequential(layer)


def scaled_first(model: nn.Module) -> nn.Module:
    return biofx.transform(model, passes=ScaleGradients()).graph_module


def signed_first(model: nn.Module) -> nn.Module:
    everywhere = ConstrainSigns(constrain_inputs=True, constrain_readout=True)
    return biofx.transform(model, passes=everywhere).graph_module


def expanded_first(model: nn.Module) -> nn.Module:
    return biofx.transform(model, passes=ExpandUnits()).graph_module


def layers(*sizes: int) -> nn.Sequential:
    made = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
    return nn.Sequential(*[part for layer in made for part in (layer, nn.ReLU())][:-1])


@pytest.mark.parametrize(
    ("model", "options", "layer", "reason"),
    [
        (
            layers(4, 4),
            {},
            "0",
            "every connection exists, without blocks and mask (density=1, in a config weight_density)",
        ),
        (
            layers(4, 4),
            {"self_connections": False},
            "0",
            "it reads none of the units that it makes",
        ),
        (
            nn.Embedding(5, 4),
            {"density": 0.5},
            "",
            "its rows are looked up, and no unit is presynaptic",
        ),
        (Looked(), {"density": 0.5}, "table", "its rows are looked up"),
        (hooked(), {"density": 0.5}, "0", "it has forward hooks, which would no longer run"),
        (nn.Linear(4, 4, device="meta"), {"density": 0.5}, "", "its weight is on the meta device"),
        (nn.Linear(4, 4, dtype=torch.complex64), {"density": 0.5}, "", "its weight is complex"),
        (scaled_first(layers(4, 4)), {"density": 0.5}, "0", "it passes through '_0_scaled' already"),
        (signed_first(layers(4, 4)), {"density": 0.5}, "0", "it passes through '_0_signed' already"),
        (
            expanded_first(layers(4, 4, 4, 2)),
            {"density": 0.5},
            "2",
            "its units are pairs of an",
        ),
        (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
            {"density": 0.5},
            "0",
            "its weight is computed by a parametrization",
        ),
        (Tied(), {"density": 0.5, "only": "first"}, "first", "its weight is also used by 'second'"),
    ],
)
def test_what_is_left_alone_says_why(
    model: nn.Module, options: dict[str, Any], layer: str, reason: str
) -> None:
    bio, report = masked(model, **options)
    assert any(remark.layer == layer and reason in remark.message for remark in report.remarks)
    assert not bio.graph.find_nodes(op="call_function", target=mask_weight) or layer in ("first", "2")


def test_a_name_that_states_use_is_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sign = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.sign)

    _, report = masked(Odd(), density=0.5)
    assert reasons(report)[""] == "plasticity states use its name, 'sign', for something else"


def test_a_second_application_changes_nothing(mlp: nn.Module) -> None:
    bio, _ = masked(mlp, density=0.5)
    again, report = masked(bio, density=0.5)
    assert biofx.format_graph(again) == biofx.format_graph(bio)
    assert set(reasons(report).values()) == {"it is masked already"}
    assert not report.unmet


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "11 11"}, r"expected 6 rows of 4 for '0.weight' of shape \(6, 4\), found 2 rows of 2"),
        ({"blocks": [[1, 0, 1]]}, "expected 1 × 3 areas that divide the 6 outputs and 4 inputs"),
        ({"blocks": [[1], [0]], "areas": [2, 3]}, "expected 2 areas with the 6 outputs and 1 with"),
        ({"blocks": [[1, 0], [0, 1]], "areas": [[2, 3], [2, 2]]}, r"found \[2, 3\] and \[2, 2\]"),
        ({"density": 0.5, "areas": [3, 3]}, "expected weight_mask_blocks with them, found none"),
    ],
)
def test_what_does_not_fit_is_refused(mlp: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        masked(mlp, **options)


def test_gates_with_masks_of_their_own_are_refused() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]  # type: ignore[no-any-return]

    bio, _ = masked(Recurrent(), mask="10 01")
    assert mask_of(bio, "rnn.weight_hh_l0").tolist() == [[1, -1], [-1, 1]] * 3
    bio, _ = masked(Recurrent(), mask="10 01 10 01 10 01")
    assert mask_of(bio, "rnn.weight_hh_l0").tolist() == [[1, -1], [-1, 1]] * 3
    with pytest.raises(OptionError, match=r"expected the same mask for the 3 gates of 'rnn\.weight_ih_l0'"):
        masked(Recurrent(), mask="10 01 10 01 11 11")


def test_areas_of_a_config_that_masks_nothing_are_refused(mlp: nn.Module) -> None:
    config = biofx.BioConfig().override("0", weight_mask_areas=[2, 2])
    with pytest.raises(OptionError, match="those given for '0' would not be used"):
        biofx.transform(mlp, config)


@pytest.mark.parametrize(
    ("fields", "is_on"),
    [
        ({}, False),
        ({"weight_density": 0.5}, True),
        ({"weight_mask_self_connections": False}, True),
        ({"weight_mask_blocks": [[1]]}, True),
        ({"weight_mask_initialisation": "keep"}, False),
    ],
)
def test_a_config_runs_the_pass_if_a_field_asks_for_it(
    mlp: nn.Module, fields: dict[str, Any], is_on: bool
) -> None:
    for config in (biofx.BioConfig(**OFF, **fields), biofx.BioConfig(**OFF).override("0", **(fields or OFF))):
        report = biofx.transform(mlp, config).report
        assert [entry.name for entry in report.passes] == ["mask-weights"] * is_on


# with other mechanisms


def test_balanced_signs_keep_to_the_connections_that_exist() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 200), nn.ReLU(), nn.Linear(200, 100), nn.ReLU(), nn.Linear(100, 2))
    bio, _ = biofx.transform(model, biofx.BioConfig(**OFF, weight_density=0.2, apply_dales_principle=True))
    weight, exists = bio.get_parameter("2.weight").detach(), mask_of(bio, "2.weight") == 1
    assert (weight[~exists] == 0).all()
    sign = bio.get_buffer("0.bio_mod.sign")
    assert (weight * sign >= 0).all()
    excitation, inhibition = weight.clamp(min=0).sum(1), weight.clamp(max=0).sum(1)
    torch.testing.assert_close(excitation, -inhibition, rtol=1e-4, atol=1e-6)
    assert ((weight != 0).sum(1) >= 8).all()  # of 40 connections the balance keeps 16 on average
    before = (torch.where(exists, model[2].weight.detach() * 5**0.5, 0)).square().sum(1)  # type: ignore[operator]
    torch.testing.assert_close(weight.square().sum(1), before / (1 - 1 / torch.pi), rtol=1e-3, atol=0)
    order = [node.name for node in bio.graph.nodes if node.name.startswith("_2_")]
    assert order.index("_2_masked") < order.index("_2_signed")


def test_masked_signed_split_and_scaled_weights_are_those_of_the_definition(vectors: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    config = biofx.BioConfig(weight_density=0.5, apply_dales_principle=True, weight_splitting_Gamma=2)
    bio, _ = biofx.transform(model, config)

    def pooled(y: Tensor) -> Tensor:
        pairs = y.reshape(len(y), -1, 2).sum(2)
        return torch.stack([pairs, pairs], 2).reshape(y.shape)

    raw = {name: parameter.detach().clone() for name, parameter in bio.named_parameters()}
    used = {name: value.clone().requires_grad_() for name, value in raw.items()}
    for path in ("0.weight", "2.weight", "4.weight"):
        used[path] = effective(bio, path).requires_grad_()
    y = F.relu(pooled(F.linear(vectors, used["0.weight"], used["0.bias"])))
    y = F.relu(pooled(F.linear(y, used["2.weight"], used["2.bias"])))
    expected = F.linear(y, used["4.weight"], used["4.bias"])
    found = bio(vectors)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    sign = bio.get_buffer("0.bio_mod.sign")
    for path in ("0.weight", "2.weight", "4.weight"):
        gradient: Any = used[path].grad
        if path == "2.weight":
            outward = (used[path] * sign <= 0) & (gradient * sign > 0)
            gradient = torch.where(outward, 0, gradient)
        state: Any = bio.get_submodule(path.removesuffix(".weight")).bio_mod
        gradient = torch.where(mask_of(bio, path) == 1, gradient * state.fuzzy_learning_rate_parameters, 0)
        torch.testing.assert_close(bio.get_parameter(path).grad, gradient)


@pytest.mark.filterwarnings("ignore:.* steps a model whose learning-rate factors")
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
@pytest.mark.parametrize("rules", [None, ["crystallize", "volume_dependent_lr", "synaptic_scaling"]])
def test_zeros_stay_and_missing_entries_never_matter_in_training(
    mlp: nn.Module, vectors: Tensor, optimizer: Any, rules: list[str] | None
) -> None:
    def trained(garbage: float) -> nn.Module:
        bio, _ = biofx.transform(mlp, biofx.BioConfig(weight_density=0.5, apply_dales_principle=True))
        with torch.no_grad():
            for path in ("0.weight", "2.weight", "4.weight"):
                bio.get_parameter(path)[mask_of(bio, path) != 1] = garbage
        options = {"lr": 0.01, "weight_decay": 0.1}
        if optimizer is not torch.optim.AdamW:
            options["momentum"] = 0.9
        training = optimizer(bio.parameters(), **options)
        if rules is not None:
            biofx.attach(bio, training, rules)
        for _ in range(200 if garbage == 0 else 40):
            training.zero_grad()
            (bio(vectors) - 1).square().sum().backward()
            training.step()
        return bio

    clean = trained(0.0)
    for path in ("0.weight", "2.weight", "4.weight"):
        missing = mask_of(clean, path) != 1
        assert torch.equal(clean.get_parameter(path)[missing], torch.zeros(int(missing.sum())))
    assert biofx.check(clean).ok
    one, other = trained(3.0), trained(-7.0)
    assert torch.equal(one(vectors), other(vectors))


# what it survives


def test_the_model_that_is_given_stays_as_it_was(
    mlp: nn.Module, unchanged: Callable[[nn.Module], Any]
) -> None:
    with unchanged(mlp):
        masked(mlp, density=0.3)


def test_masked_weights_are_not_shared_with_the_model_and_its_biases_are(mlp: nn.Module) -> None:
    before = mlp.get_parameter("0.weight").detach().clone()
    bio = biofx.transform(mlp, passes=MaskWeights(density=0.5), share_parameters=True).graph_module
    assert bio.get_parameter("0.bias") is mlp.get_parameter("0.bias")
    assert torch.equal(mlp.get_parameter("0.weight"), before)
    assert bio.get_parameter("0.weight") is not mlp.get_parameter("0.weight")


def test_copies_pickles_and_state_dicts_keep_the_mask(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = masked(mlp, density=0.5)
    expected = bio(vectors)
    assert torch.equal(copy.deepcopy(bio)(vectors), expected)
    assert torch.equal(pickle.loads(pickle.dumps(bio))(vectors), expected)
    saved = bio.state_dict()
    assert [key for key in saved if "bio_mod" not in key] == list(mlp.state_dict())
    other, _ = masked(mlp, density=0.5, seed=5)
    assert not torch.equal(other(vectors), expected)
    other.load_state_dict(saved)
    assert torch.equal(other(vectors), expected)
    bio.load_state_dict(mlp.state_dict())  # a plain checkpoint: what does not exist stays 0
    assert torch.equal(bio(vectors), by_hand(bio, vectors))
    assert (bio.get_parameter("0.weight")[mask_of(bio, "0.weight") != 1] != 0).all()


def test_a_deployed_model_has_plain_weights_with_zeros(mlp: nn.Module, vectors: Tensor) -> None:
    bio, _ = masked(mlp, density=0.5)
    with torch.no_grad():
        bio.get_parameter("0.weight").normal_()
    plain = biofx.deploy(bio)
    assert torch.equal(plain.get_parameter("0.weight"), effective(bio, "0.weight"))
    assert set(plain.state_dict()) == set(mlp.state_dict())
    torch.testing.assert_close(plain(vectors), bio(vectors))


def test_an_audit_finds_masks_that_are_broken(mlp: nn.Module) -> None:
    bio, _ = masked(mlp, density=0.5)
    audit = biofx.check(bio)
    assert audit.ok
    found = audit.to_dict()["layers"]["0"]["masks"]
    assert (found["checked"], found["details"]) == (24, {"connections": 12})
    mask_of(bio, "0.weight")[0, 0] = 0.3
    assert [fault.invariant for fault in biofx.check(bio).faults] == ["mask values"]
    bio, _ = masked(mlp, density=0.5)
    (node, *_) = bio.graph.find_nodes(op="call_function", target=mask_weight)
    node.replace_all_uses_with(node.args[0])
    bio.recompile()
    faults = {fault.invariant for fault in biofx.check(bio).faults}
    assert "mask uses" in faults


def test_sites_see_through_a_mask(mlp: nn.Module) -> None:
    from biofx.layers.sites import find_sites

    bio, _ = masked(mlp, density=0.5)
    sites: list[WeightSite] = find_sites(bio).found
    assert [site.parameter_path for site in sites] == ["0.weight", "2.weight", "4.weight"]
    assert all(site.has(mask_weight) and site.value_blocker is None for site in sites)
