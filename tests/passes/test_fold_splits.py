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
from biofx.operators.split_ops import fold_weight, folded_shape, pool_synapses
from biofx.passes import FoldSplits


def fold(model: nn.Module, gamma: int = 2, before: str = "", **options: Any) -> biofx.PassResult:
    """Split, do what ``before`` says, fold."""
    earlier = f"split-weights{{gamma={gamma}}}{before}"
    return biofx.transform(model, passes=[earlier, FoldSplits(**options)])


def unfolded(model: nn.Module, gamma: int = 2, before: str = "") -> biofx.BioGraphModule:
    return biofx.transform(model, passes=f"split-weights{{gamma={gamma}}}{before}").graph_module


def assert_same(found: nn.Module, expected: nn.Module, x: Tensor) -> None:
    """Outputs, gradients and buffers are the same in training and in evaluation."""
    for training in (True, False):
        results = []
        for model in (found.train(training), expected.train(training)):
            model.zero_grad()
            torch.manual_seed(3)
            output = model(x)
            output.square().sum().backward()
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            results.append((output, gradients, {n: b.clone() for n, b in model.named_buffers()}))
        torch.testing.assert_close(results[0], results[1])


def remarks(report: biofx.Report, kind: str = "missed") -> dict[str | None, str]:
    found = [remark for remark in report.passes[-1].remarks if remark.kind == kind]
    return {remark.node: remark.message for remark in found}


def targets(graph_module: biofx.BioGraphModule) -> set[str]:
    return {getattr(node.target, "__name__", str(node.target)) for node in graph_module.graph.nodes}


def convolutions(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), *between, nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))


IMAGES = (2, 3, 9, 9)


def test_graph_and_report(residual_net: nn.Module, golden: Callable[[str, str], None]) -> None:
    bio, report = fold(residual_net)
    golden("fold_splits", f"{biofx.format_graph(bio)}\n\n{report}")


def test_chain_computes_with_one_value_per_connection(mlp: nn.Module, vectors: Tensor) -> None:
    bio, report = fold(mlp, before=",constrain-signs,scale-gradients")
    assert "pool_synapses" not in targets(bio)
    assert "spread_synapses" not in targets(bio)
    shapes = {n.name: tuple(v.shape) for n, v in values(bio, vectors).items() if isinstance(v, Tensor)}
    assert [shapes[name] for name in ("_0", "_1", "_2", "_3", "_4")] == [
        (5, 3),
        (5, 3),
        (5, 2),
        (5, 2),
        (5, 2),
    ]
    assert_same(bio, unfolded(mlp, before=",constrain-signs,scale-gradients"), vectors)
    assert remarks(report, "applied")["_2"] == (
        "rows in groups of 2 and columns in groups of 2 summed: 24 multiply-adds per position become 6"
    )


def values(bio: biofx.BioGraphModule, x: Tensor) -> dict[torch.fx.Node, Any]:
    interpreter = torch.fx.Interpreter(bio, garbage_collect_values=False)
    interpreter.run(x)
    return interpreter.env


def test_it_is_on_by_default_and_off_by_its_field(mlp: nn.Module) -> None:
    config = biofx.BioConfig(weight_splitting_Gamma=2)
    assert [entry.name for entry in biofx.rewriting.compile_config(config).passes][-1] == "fold-splits"
    off = config.replace(weight_splitting_fold=False)
    assert "fold-splits" not in [entry.name for entry in biofx.rewriting.compile_config(off).passes]
    assert "pool_synapses" in targets(biofx.transform(mlp, off).graph_module)
    assert "fold-splits" not in [
        entry.name for entry in biofx.rewriting.compile_config(biofx.BioConfig()).passes
    ]


def test_parameters_states_and_keys_stay(mlp: nn.Module) -> None:
    before = ",constrain-signs,scale-gradients"
    folded, plain = fold(mlp, before=before).graph_module, unfolded(mlp, before=before)
    assert list(folded.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in folded.named_parameters()] == [n for n, _ in mlp.named_parameters()]
    torch.testing.assert_close(folded.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("gamma", [2, 4])
def test_groups_of_convolutions(groups: int, kind: Any, gamma: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Tanh(), kind(8, 8, 3, groups=groups), nn.Tanh(), kind(8, 8, 1, groups=groups)
    )
    model.append(nn.Conv2d(8, 2, 1))
    bio, report = fold(model, gamma)
    assert "spread_synapses" not in targets(bio)
    assert {"_0", "_2", "_4", "_5"} <= set(remarks(report, "applied"))
    assert_same(bio, unfolded(model, gamma), torch.randn(IMAGES))


def test_groups_that_cut_connections_apart_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 1, groups=4), nn.Conv2d(12, 2, 1))
    bio, report = fold(model, 2)
    assert remarks(report)["_1"] == (
        "members are set apart for it: its 4 groups do not hold whole connections of 2"
    )
    assert_same(bio, unfolded(model, 2), torch.randn(IMAGES))
    assert folded_shape((12, 3, 1, 1), rows=2, columns=1, groups=4, transposed=False) is None


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (nn.Dropout(0.5), "in training mode it samples a mask for each channel"),
        (nn.PReLU(4), "it has a slope for each channel"),
        (nn.ChannelShuffle(2), "channelshuffle may mix channels, or is not known to keep them apart"),
        (nn.Softmax(1), "softmax may mix channels, or is not known to keep them apart"),
        (nn.GroupNorm(4, 4), "its 4 groups do not hold whole connections"),
        (nn.InstanceNorm2d(4, affine=True), "it has parameters or statistics for each channel"),
        (nn.Flatten(0, 1), "it merges the channels into axes before them"),
    ],
)
def test_what_needs_the_members_apart(between: nn.Module, reason: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), between, nn.Unflatten(0, (2, 4)) if "Flat" in str(between) else nn.ReLU()
    )
    model.extend([nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)])
    bio, report = fold(model)
    assert remarks(report)["_1"] == f"members are set apart for it: {reason}"
    assert_same(bio, unfolded(model), torch.randn(IMAGES))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.BatchNorm2d(4, affine=False),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.BatchNorm2d(4, affine=False, track_running_stats=False),
        nn.GroupNorm(2, 4),
        nn.GroupNorm(1, 4, affine=False),
        nn.LayerNorm([4, 7, 7]),
        nn.LayerNorm([4, 7, 7], bias=False),
        nn.LayerNorm(7),
        nn.InstanceNorm2d(4),
    ],
    ids=str,
)
def test_statistics_are_those_of_the_connections(norm: nn.Module) -> None:
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    model = convolutions(norm, nn.ReLU(inplace=True))
    bio, report = fold(model)
    assert "_0" in remarks(report, "applied")
    assert "_1" not in remarks(report)
    for training in (True, False):
        held = {n.name: v for n, v in values(bio.train(training), torch.randn(IMAGES)).items()}
        assert held["_0"].shape[1] == 2
    model = convolutions(copy.deepcopy(norm), nn.ReLU(inplace=True))
    assert_same(fold(model).graph_module, unfolded(model), torch.randn(IMAGES))


def test_statistics_that_differ_between_members_are_kept_apart_in_evaluation() -> None:
    model = convolutions(nn.BatchNorm2d(4))
    norm: Any = model[1]  # type: ignore[index]
    norm.running_mean.copy_(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    norm.running_var.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert_same(fold(model).graph_module.eval(), unfolded(model).eval(), torch.randn(IMAGES))


class Branches(nn.Module):
    """A residual sum, a concatenation, a layer called twice, and an output that others read too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.join, self.head = nn.Conv2d(8, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        y = F.relu(self.twice(x))
        y = self.twice(y) + x
        z = F.relu(self.join(torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(x, 2)], dim=1)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(z, 1), 1))


def test_branches_are_carried_through() -> None:
    model = Branches()
    bio, report = fold(model)
    assert "spread_synapses" not in targets(bio)
    assert not remarks(report)
    assert_same(bio, unfolded(model), torch.randn(IMAGES))
    assert sum(node.target is fold_weight for node in bio.graph.nodes) == 4  # one for both calls


def test_a_value_that_the_model_returns_is_given_in_full() -> None:
    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            hidden = self.fc(x).relu()
            return self.head(hidden), hidden.shape, hidden

    # a layer whose output is returned is a readout; only a user's own pool makes this graph
    captured = biofx.capture(Returns())
    relu = next(node for node in captured.graph.nodes if node.name == "relu")
    layer = next(node for node in captured.graph.nodes if node.name == "fc")
    with captured.graph.inserting_after(layer):
        pool = captured.graph.call_function(pool_synapses, (layer,), {"gamma": 2, "channel_axis": -1})
    relu.replace_input_with(layer, pool)
    captured.recompile()
    folded, report = FoldSplits()(captured)
    x = torch.randn(5, 3)
    torch.testing.assert_close(folded(x), captured(x))
    assert folded(x)[1] == torch.Size([5, 4])
    assert remarks(report)["output"] == "members are set apart for it: the model returns it"


def test_a_nonlinear_activation_leaves_rows_and_folds_columns(mlp: nn.Module, vectors: Tensor) -> None:
    split = "split-weights{gamma=2,activation=torch.tanh}"
    bio, report = biofx.transform(mlp, passes=f"{split},fold-splits")
    assert remarks(report, "applied")["_0_pooled"] == (
        "summed once for all members; rows of 0 stay: the activation before the sum is not linear"
    )
    assert_same(bio, biofx.transform(mlp, passes=split).graph_module, vectors)


def test_a_module_with_hooks_sees_what_it_saw(mlp: nn.Sequential, vectors: Tensor) -> None:
    seen: list[torch.Size] = []
    mlp[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    bio, report = fold(mlp)
    bio(vectors)
    assert seen[-1] == (5, 6)
    assert "forward hooks" in remarks(report)["_1"]


def test_a_value_changed_in_place_while_others_read_it_is_left_alone() -> None:
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Any:
            hidden = self.fc(x)
            first = self.left(hidden * 1)
            hidden += 1
            return first + self.right(hidden.cumsum(-1))

    model = Overwrites()
    assert_same(fold(model).graph_module, unfolded(model), torch.randn(5, 3))


def test_selection_leaves_a_layer_unfolded(mlp: nn.Module, vectors: Tensor) -> None:
    bio, report = fold(mlp, exclude="2")
    assert remarks(report)["_2"] == "members are set apart for it: excluded by '2'"
    assert_same(bio, unfolded(mlp), vectors)


def test_input_without_a_batch() -> None:
    model = convolutions(nn.ReLU(), nn.MaxPool2d(2))
    bio, plain = fold(model).graph_module, unfolded(model)
    x = torch.randn(IMAGES)[0].repeat(1, 2, 2)
    torch.testing.assert_close(bio(x), plain(x))
    counted = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 49, 2))
    with pytest.raises(biofx.errors.InputError, match=r"expected a tensor with 4 axes \(a batch\)"):
        fold(counted).graph_module(torch.randn(3, 9, 9))


def test_channels_last() -> None:
    model = convolutions(nn.BatchNorm2d(4), nn.ReLU())
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(IMAGES).to(memory_format=torch.channels_last)
    assert_same(fold(model).graph_module, unfolded(model), x)


def test_a_second_application_changes_nothing(mlp: nn.Module) -> None:
    config = biofx.BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True)
    once = biofx.transform(mlp, config).graph_module
    twice, report = biofx.transform(once, config)
    assert not report.modified
    assert biofx.format_graph(twice) == biofx.format_graph(once)


@pytest.mark.parametrize("late", ["scale-gradients", "constrain-signs", "observe-activity"])
def test_what_comes_before_a_fold_refuses_a_folded_weight(mlp: nn.Module, late: str) -> None:
    _, report = biofx.transform(fold(mlp).graph_module, passes=late)
    (message,) = {remark.message for remark in report.remarks if remark.layer == "2"}
    assert "folded already" in message


def compiled(bio: nn.Module, x: Tensor) -> Any:
    return torch.compile(bio, fullgraph=True, backend="aot_eager")


def exported(bio: nn.Module, x: Tensor) -> Any:
    return torch.export.export(bio.train(), (x,)).module()


def retraced(bio: nn.Module, x: Tensor) -> Any:
    return torch.fx.symbolic_trace(bio)


@pytest.mark.parametrize(
    "survives",
    [
        lambda bio, x: copy.deepcopy(bio),
        lambda bio, x: pickle.loads(pickle.dumps(bio)),
        retraced,
        compiled,
        exported,
    ],
    ids=["deepcopy", "pickle", "trace", "compile", "export"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own
def test_outputs_and_gradients_survive(survives: Callable[[nn.Module, Tensor], Any]) -> None:
    model = convolutions(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2), nn.GELU())
    x = torch.randn(IMAGES)
    bio = fold(model, before=",constrain-signs,scale-gradients").graph_module.train()
    other = survives(copy.deepcopy(bio), x)
    outputs, gradients = [], []
    for made in (bio, other):
        output = made(x)
        output.square().sum().backward()
        outputs.append(output)
        gradients.append([parameter.grad for parameter in made.parameters()])
    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("rows", [1, 2])
def test_folded_weight_is_the_sum_and_its_gradient_goes_to_all(rows: int, columns: int) -> None:
    weight = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    folded = fold_weight(weight, rows=rows, columns=columns, inner=2)
    expected = torch.zeros(4 // rows, 12 // columns, dtype=torch.float64)
    for out in range(4):
        for channel in range(6):
            for place in range(2):
                expected[out // rows, channel // columns * 2 + place] += weight[
                    out, channel * 2 + place
                ].detach()
    torch.testing.assert_close(folded, expected)
    assert torch.autograd.gradcheck(lambda w: fold_weight(w, rows=rows, columns=columns, inner=2), (weight,))
    assert torch.autograd.gradgradcheck(
        lambda w: fold_weight(w, rows=rows, columns=columns, inner=2).pow(3), (weight,)
    )


# torch.func imports decompositions that torch scripts itself
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_gradients_of_each_sample_and_tangents(mlp: nn.Module, vectors: Tensor) -> None:
    folded, plain = fold(mlp).graph_module, unfolded(mlp)
    found = []
    for model in (folded, plain):
        parameters: dict[str, Tensor] = dict(model.named_parameters())

        def loss(values: dict[str, Tensor], x: Tensor, model: nn.Module = model) -> Any:
            return torch.func.functional_call(model, values, (x,)).square().sum()

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, vectors)
        tangents = {name: torch.ones_like(value) for name, value in parameters.items()}
        tangent = torch.func.jvp(lambda values: loss(values, vectors), (parameters,), (tangents,))[1]
        with torch.autograd.forward_ad.dual_level():
            dual = {
                name: torch.autograd.forward_ad.make_dual(value.detach(), tangents[name])
                for name, value in parameters.items()
            }
            forward = torch.autograd.forward_ad.unpack_dual(loss(dual, vectors)).tangent
        found.append((gradients, tangent, forward))
    torch.testing.assert_close(found[0], found[1])
