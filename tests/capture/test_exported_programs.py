"""A program that torch exported is rewritten as the model is that it was exported from."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import biofx
from biofx.errors import BiofxWarning, CaptureError, InputError
from biofx.plasticity.model_states import prepare_states as states_of

CONFIG = biofx.BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True, seed=3)


class Convolutional(nn.Module):
    """Convolutions, normalisations, a residual sum, dropout as a layer and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1, groups=2))
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.norm = nn.GroupNorm(2, 4)
        self.drop = nn.Dropout2d(0.3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = F.max_pool2d(x + self.body(x), 2)
        x = self.drop(self.norm(self.up(x))).mean((2, 3))
        logits: Tensor = self.head(F.dropout(x, 0.2, self.training))
        return logits


class Attending(nn.Module):
    """A transformer's block, with an embedding whose weight the head shares."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.block(self.embed(tokens))))
        return logits


class Recurrent(nn.Module):
    """A recurrent layer of each kind, whose states are read too."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, batch_first=True, dropout=0.1, bidirectional=True)
        self.gru = nn.GRU(8, 4, batch_first=True)
        self.rnn = nn.RNN(4, 4, nonlinearity="relu", batch_first=True)
        self.readout = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, c) = self.lstm(x)
        y, last = self.gru(y)
        y, _ = self.rnn(y, last)
        read: Tensor = self.readout(y)
        states: Tensor = h.sum() + c.sum()
        return read + states


class Nested(nn.Module):
    """Takes and returns containers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 2)

    def forward(self, x: Tensor, extra: dict[str, Tensor], *, pair: tuple[Tensor, Tensor]) -> dict[str, Any]:
        hidden = torch.tanh(self.first(x + extra["shift"]) * pair[0])
        return {"out": self.second(hidden), "parts": [hidden, (pair[1],)]}


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 2))


Call = tuple[tuple[Any, ...], dict[str, Any]]
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Call]]] = {
    "perceptron": (perceptron, lambda: ((torch.randn(4, 5),), {})),
    "convolutional": (Convolutional, lambda: ((torch.randn(3, 1, 8, 8),), {})),
    "attending": (Attending, lambda: ((torch.randint(11, (2, 5)),), {})),
    "recurrent": (Recurrent, lambda: ((torch.randn(2, 5, 3),), {})),
    "nested": (
        Nested,
        lambda: (
            (torch.randn(3, 4), {"shift": torch.randn(4)}),
            {"pair": (torch.randn(6), torch.randn(2))},
        ),
    ),
}


@pytest.fixture(params=MODELS)
def made(request: pytest.FixtureRequest) -> tuple[nn.Module, Call]:
    build, inputs = MODELS[request.param]
    return build(), inputs()


@pytest.fixture(autouse=True)
def _without_the_warning() -> Iterator[None]:
    """The warning has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the program was exported in", BiofxWarning)
        for kind in (FutureWarning, DeprecationWarning):  # torch.export's own
            warnings.filterwarnings("ignore", category=kind)
        warnings.filterwarnings("ignore", "The tensor attributes self.*_flat_weights")
        yield


def exported(model: nn.Module, call: Call, **options: Any) -> ExportedProgram:
    return torch.export.export(model, *call, **options)


def results(model: nn.Module, call: Call) -> list[Any]:
    torch.manual_seed(5)
    return torch.utils._pytree.tree_leaves(model(*call[0], **call[1]))


def assert_same(left: nn.Module, right: nn.Module, call: Call) -> None:
    for ours, others in zip(results(left, call), results(right, call), strict=True):
        assert torch.equal(ours, others)


@pytest.mark.parametrize("training", [True, False])
def test_a_program_with_everything_off_is_the_model_in_both_modes(
    made: tuple[nn.Module, Call], training: bool
) -> None:
    model, call = made
    program = exported(copy.deepcopy(model).train(training), call)
    bio, _ = biofx.transform(program, biofx.BioConfig(fuzzy_lr_distribution=biofx.Distribution.BASELINE))
    assert bio.training is training or isinstance(model, Nested)  # which says nothing of a mode
    for mode in (training, not training):
        if mode and not training and isinstance(model, Attending):
            continue  # the dropout of attention is no part of a program that was exported in evaluation
        assert_same(copy.deepcopy(model).train(mode), copy.deepcopy(bio).train(mode), call)
    loss, others = (
        sum(value.sum() for value in results(each.train(training), call)) for each in (model, bio)
    )
    loss.backward()
    others.backward()
    found = dict(bio.named_parameters())
    assert list(found) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=0, atol=0)


def test_the_same_is_rewritten_with_the_same_numbers(made: tuple[nn.Module, Call]) -> None:
    model, call = made
    plain, report = biofx.transform(model, CONFIG)
    bio, other = biofx.transform(exported(model, call), CONFIG)
    if not isinstance(model, Attending):  # whose attention is written out in a program
        assert _applied(other) == _applied(report)
        assert bio.state_dict().keys() == plain.state_dict().keys()
        for name, value in plain.state_dict().items():
            assert torch.equal(bio.state_dict()[name], value)
        assert_same(plain, bio, call)
    for path, state in states_of(plain).items():
        if path.endswith("in_proj_weight"):
            continue
        found = states_of(bio)[path]
        assert_equal_states(found, state)


def assert_equal_states(found: biofx.BioModule, expected: biofx.BioModule) -> None:
    for name in ("sign", "fuzzy_learning_rate_parameters"):
        left, right = getattr(found, name), getattr(expected, name)
        assert (left is None) == (right is None)
        assert left is None or torch.equal(left, right)


def _applied(report: biofx.Report) -> list[tuple[str, str]]:
    return [
        (found.name, remark.layer)
        for found in report.passes
        for remark in found.remarks
        if remark.kind == "applied" and found.name != "fold-splits"
    ]


def test_selectors_and_printouts_name_the_modules() -> None:
    program = exported(Convolutional(), MODELS["convolutional"][1]())
    bio, report = biofx.transform(
        program, biofx.BioConfig(weight_splitting_Gamma=2), only=["body.*", "type:ConvTranspose2d"]
    )
    assert _applied(report) == [
        *(("split-weights", path) for path in ("body.0", "body.2", "up")),
        *(("scale-gradients", path) for path in ("body.0", "body.2", "up")),
    ]
    shown = biofx.format_graph(bio)
    assert "bn = self.bn(stem)  # BatchNorm2d" in shown
    assert "aten" not in shown
    assert type(bio).__name__ == "Convolutional"


class Base(nn.Sequential):
    """The class that a container's is derived from."""


class Stem(Base):
    """A container that is selected by its class."""


def test_containers_are_selected_by_the_names_of_their_classes() -> None:
    model = nn.Sequential(Stem(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    program = exported(model, ((torch.randn(3, 4),), {}))
    for selector in ("type:Stem", Stem):
        _, report = biofx.transform(program, only=selector)
        assert _applied(report) == [("scale-gradients", "0.0")]
    with pytest.raises(biofx.errors.SelectorError, match="names the classes of its modules, not their bases"):
        biofx.transform(program, only=Base)


def test_what_was_free_stays_free_and_what_was_fixed_is_checked() -> None:
    batch = Dim("batch", min=2, max=9)
    program = exported(perceptron(), ((torch.randn(4, 5),), {}), dynamic_shapes=({0: batch},))
    bio, _ = biofx.transform(program)
    assert bio(torch.randn(7, 5)).shape == (7, 2)
    with pytest.raises(InputError, match=r"input: expected size 2 to 9 along axis 0.*found 12"):
        bio(torch.randn(12, 5))
    fixed, _ = biofx.transform(exported(perceptron(), ((torch.randn(4, 5),), {})))
    with pytest.raises(InputError, match=r"expected size 4 along axis 0, for.*found 3.*dynamic_shapes"):
        fixed(torch.randn(3, 5))


class Summing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, y: Tensor, times: int) -> Tensor:
        made: Tensor = self.fc(x)
        return made * times + y


def test_equal_sizes_and_fixed_values_are_checked() -> None:
    batch = Dim("batch", min=2)
    call: Call = ((torch.randn(4, 3), torch.randn(4, 3), 2), {})
    bio, _ = biofx.transform(exported(Summing(), call, dynamic_shapes=({0: batch}, {0: batch}, None)))
    bio(torch.randn(6, 3), torch.randn(6, 3), 2)
    with pytest.raises(InputError, match=r"y: expected size 6 along axis 0.*found 1"):
        bio(torch.randn(6, 3), torch.randn(1, 3), 2)
    with pytest.raises(InputError, match=r"times: expected 2.*found 3"):
        bio(torch.randn(6, 3), torch.randn(6, 3), 3)


def test_a_decomposed_program_is_one_of_the_same_weights() -> None:
    model = nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)
    )
    call: Call = ((torch.randn(4, 5),), {})
    bio, _ = biofx.transform(exported(model.eval(), call).run_decompositions(), CONFIG)
    plain, _ = biofx.transform(model, CONFIG)
    for path, state in states_of(plain).items():
        assert_equal_states(states_of(bio)[path], state)
    assert_same(biofx.transform(exported(model, call).run_decompositions(), _off())[0], model, call)


def _off() -> biofx.BioConfig:
    return biofx.BioConfig(fuzzy_lr_distribution=biofx.Distribution.BASELINE)


def test_graphs_of_dynamo_have_the_original_names() -> None:
    model = perceptron()
    found = torch._dynamo.export(model)(torch.randn(4, 5)).graph_module
    bio, report = biofx.transform(found, CONFIG)
    plain, expected = biofx.transform(model, CONFIG)
    assert _applied(report) == _applied(expected)
    assert_same(plain, bio, ((torch.randn(4, 5),), {}))


def test_a_graph_without_names_is_rewritten_by_those_it_has() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    bio, report = biofx.transform(make_fx(model)(torch.randn(5, 3)))
    assert [state.numel() for _, state in bio.named_parameters()] == [12, 4, 8, 2]
    assert report.modified
    assert_same(model, bio, ((torch.randn(5, 3),), {}))


def test_what_the_program_does_not_hold_is_said() -> None:
    call: Call = ((torch.randn(4, 5),), {})
    with pytest.warns(BiofxWarning, match="exported in evaluation: .* in training is not in it"):
        biofx.transform(exported(perceptron().eval(), call))
    with pytest.warns(BiofxWarning, match="exported in training: .* in evaluation is not in it") as said:
        biofx.transform(exported(perceptron(), call))
    assert said[0].filename == __file__


def test_the_program_is_not_changed() -> None:
    call: Call = ((torch.randn(4, 5),), {})
    program = exported(perceptron(), call)
    before = {name: value.clone() for name, value in program.state_dict.items()}
    code, state = str(program.graph), torch.get_rng_state()
    bio, _ = biofx.transform(program, CONFIG)
    assert torch.equal(torch.get_rng_state(), state)
    bio(torch.randn(4, 5)).sum().backward()
    assert str(program.graph) == code
    for name, value in program.state_dict.items():
        assert torch.equal(value, before[name])
        assert value.data_ptr() not in {held.data_ptr() for held in bio.state_dict().values()}


def test_it_is_copied_saved_loaded_and_deployed(tmp_path: Any) -> None:
    call: Call = ((torch.randn(3, 1, 8, 8),), {})
    program = exported(Convolutional(), call)
    bio, _ = biofx.transform(program, CONFIG)
    biofx.save(bio, tmp_path / "run.pt")
    for other in (
        copy.deepcopy(bio),
        pickle.loads(pickle.dumps(bio)),
        biofx.load(tmp_path / "run.pt", program),
    ):
        assert_same(bio.eval(), other.eval(), call)
    deployed = biofx.deploy(bio)
    torch.testing.assert_close(deployed(*call[0]), bio.eval()(*call[0]))
    with pytest.raises(AssertionError, match="exported"):
        deployed(torch.randn(2, 1, 8, 8))
    again = torch.export.export(bio, *call)
    torch.testing.assert_close(again.module()(*call[0]), bio(*call[0]))


def test_a_container_of_another_class_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: Any) -> Tensor:
            value: Tensor = x.value
            return value * 2

    kind = type("Held", (), {})

    def made(values: Any, _: Any) -> Any:
        held = kind()
        held.value = values[0]
        return held

    torch.utils._pytree.register_pytree_node(
        kind,
        lambda held: ([held.value], None),
        made,
        serialized_type_name="tests.Held",
        flatten_with_keys_fn=lambda held: ([(torch.utils._pytree.GetAttrKey("value"), held.value)], None),
    )
    program = torch.export.export(Odd(), (made([torch.randn(3)], None),))
    with pytest.raises(CaptureError, match=r"argument 'x'.*is a Held.*takes tensors"):
        biofx.transform(program)
