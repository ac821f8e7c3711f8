from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import biofx
from biofx import capture
from biofx.errors import InputError
from biofx.operators.compound_ops import recurrent
from biofx.operators.rate_ops import scale_gradient
from tests.layers.lowered import lowered


class Calls(nn.Module):
    """Calls a layer with an input and, perhaps, a state."""

    def __init__(self, layer: nn.Module, *, pair: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.pair = pair

    def forward(self, x: Any, first: Any, second: Any) -> Any:
        return self.layer(x, (first, second) if self.pair else first)


class Alone(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "rnn": (lambda: nn.RNN(4, 3), (5, 2, 4)),
    "rnn, relu, three layers": (lambda: nn.RNN(4, 3, 3, nonlinearity="relu"), (5, 2, 4)),
    "rnn, no bias, one sequence": (lambda: nn.RNN(4, 3, bias=False), (5, 4)),
    "gru": (lambda: nn.GRU(4, 3), (5, 2, 4)),
    "gru, both ways, two layers": (lambda: nn.GRU(4, 3, 2, bidirectional=True, dropout=0.5), (5, 2, 4)),
    "gru, no bias, batch first": (lambda: nn.GRU(4, 3, 2, bias=False, batch_first=True), (2, 5, 4)),
    "gru, one sequence": (lambda: nn.GRU(4, 3, 2, batch_first=True, bidirectional=True), (5, 4)),
    "lstm": (lambda: nn.LSTM(4, 3), (5, 2, 4)),
    "lstm, both ways, batch first": (
        lambda: nn.LSTM(4, 3, 2, bidirectional=True, batch_first=True, dropout=0.3),
        (2, 5, 4),
    ),
    "lstm, projected": (lambda: nn.LSTM(4, 3, 2, proj_size=2, bidirectional=True), (5, 2, 4)),
    "lstm, projected, no bias, one sequence": (lambda: nn.LSTM(4, 3, proj_size=2, bias=False), (5, 4)),
}
pytestmark = [  # torch says both of its own layers too
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def results(model: Any, *given: Any) -> list[Any]:
    """Return the outputs, and the gradients of inputs and parameters."""
    torch.manual_seed(0)
    inputs = [entry.detach().clone().requires_grad_() for entry in given]
    model.zero_grad()
    output = model(*inputs)
    torch.stack([leaf.square().sum() for leaf in leaves(output)]).sum().backward()
    return [
        leaves(output),
        [entry.grad for entry in inputs],
        {name: parameter.grad for name, parameter in model.named_parameters()},
    ]


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [leaf for entry in value for leaf in leaves(entry)]


def states(layer: Any, x: Tensor) -> list[Tensor]:
    chains = layer.num_layers * (1 + layer.bidirectional)
    batch = () if x.dim() == 2 else (x.size(0 if layer.batch_first else 1),)
    hidden = torch.randn(chains, *batch, layer.proj_size or layer.hidden_size)
    return [hidden, torch.randn(chains, *batch, layer.hidden_size)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_lowered_layer_equals_the_layer_to_the_bit(name: str, training: bool) -> None:
    make, shape = LAYERS[name]
    layer: Any = make()
    x = torch.randn(shape)
    pair = states(layer, x) if isinstance(layer, nn.LSTM) else states(layer, x)[:1] * 2
    for model, given in (
        (Alone(layer), [x]),
        (Calls(layer, pair=isinstance(layer, nn.LSTM)), [x, *pair]),
    ):
        found = lowered(model).train(training)
        model.train(training)
        assert not found.graph.find_nodes(op="call_module")
        expected = results(model, *given)
        torch.testing.assert_close(results(found, *given), expected, rtol=0, atol=0)
        assert list(found.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("name", ["rnn", "gru, both ways, two layers", "lstm"])
def test_packed_sequences_keep_their_order(name: str, in_order: bool) -> None:
    layer: Any = LAYERS[name][0]().eval()
    lengths = [4, 3, 1] if in_order else [1, 4, 3]
    packed = pack_sequence([torch.randn(length, 4) for length in lengths], enforce_sorted=in_order)
    model = Alone(layer).eval()
    output, end = lowered(model)(packed)
    expected, expected_end = model(packed)
    for found, wanted in zip(output, expected, strict=True):
        assert (found is None and wanted is None) or torch.equal(found, wanted)
    torch.testing.assert_close(end, expected_end, rtol=0, atol=0)
    given = states(layer, torch.zeros(4, 3, 4))
    pair = isinstance(layer, nn.LSTM)
    with_state = Calls(layer, pair=pair).eval()
    found_end = lowered(with_state)(packed, *given)[1]
    torch.testing.assert_close(found_end, with_state(packed, *given)[1], rtol=0, atol=0)


def test_dropout_follows_the_training_flag() -> None:
    found = lowered(Alone(nn.GRU(4, 3, 2, dropout=0.5)))
    x = torch.randn(5, 2, 4)
    assert not torch.equal(found(x)[0], found(x)[0])
    found.eval()
    assert torch.equal(found(x)[0], found(x)[0])


def test_a_keyword_argument_is_found() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.LSTM(4, 3)

        def forward(self, x: Tensor) -> Any:
            output, state = self.cell(input=x)
            return self.cell(hx=state, input=x)[0] + output

    model = ByName()
    x = torch.randn(5, 2, 4)
    found = lowered(model)
    assert len(found.graph.find_nodes(op="call_function", target=recurrent)) == 2
    assert len(found.graph.find_nodes(op="get_attr", target="cell.weight_hh_l0")) == 1
    torch.testing.assert_close(results(found, x), results(model, x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "state"),
    [
        (torch.zeros(2, 5, 2, 4), None),
        (torch.zeros(5, 2, 3), None),
        (torch.zeros(5, 2, 4), torch.zeros(1, 1, 3)),
        (torch.zeros(5, 2, 4), torch.zeros(1, 3)),
        (torch.zeros(5, 4), torch.zeros(1, 1, 3)),
        (pack_padded_sequence(torch.zeros(5, 2, 4), [5, 3]), torch.zeros(1, 1, 3)),
    ],
)
def test_what_the_layer_refuses_is_refused(x: Any, state: Any) -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(4, 3)

        def forward(self, x: Any, state: Any) -> Any:
            return self.cell(x, state)

    model = Either()
    with pytest.raises((RuntimeError, ValueError)):
        model(x, state)
    with pytest.raises(InputError, match="GRU: expected"):
        lowered(model)(x, state)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 3, 2, bidirectional=True)
        self.lstm = nn.LSTM(6, 5)
        self.fc = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        return self.fc(self.lstm(self.gru(x)[0])[0])


WEIGHTS = [
    *("gru.weight_ih_l0", "gru.weight_hh_l0", "gru.weight_ih_l0_reverse", "gru.weight_hh_l0_reverse"),
    *("gru.weight_ih_l1", "gru.weight_hh_l1", "gru.weight_ih_l1_reverse", "gru.weight_hh_l1_reverse"),
    *("lstm.weight_ih_l0", "lstm.weight_hh_l0", "fc.weight"),
]


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda bio: pickle.loads(pickle.dumps(bio)),
        torch.fx.symbolic_trace,
        capture,
    ],
    ids=["deepcopy", "pickle", "fx", "capture"],
)
def test_a_lowered_layer_survives(again: Callable[[Any], Any]) -> None:
    bio_model, _ = biofx.transform(Model(), passes="scale-gradients")
    x = torch.randn(5, 2, 4)
    expected = results(bio_model, x)
    found = again(bio_model)
    assert len(found.graph.find_nodes(op="call_function", target=recurrent)) == 2
    torch.testing.assert_close(results(found, x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("whole", [False, True])
def test_it_compiles_and_to_one_graph_where_torch_takes_recurrent_layers(whole: bool) -> None:
    torch._dynamo.reset()
    bio_model, _ = biofx.transform(nn.Sequential(nn.GRU(4, 3)), passes="scale-gradients")
    x = torch.randn(2, 2, 4)
    expected = results(bio_model, x)
    with torch._dynamo.config.patch(allow_rnn=whole):
        found = results(torch.compile(bio_model, backend="aot_eager", fullgraph=whole), x)
    torch.testing.assert_close(found[:2], expected[:2])
    torch.testing.assert_close(list(found[2].values()), list(expected[2].values()))


def test_a_lowered_layer_can_be_exported() -> None:
    bio_model, _ = biofx.transform(Model(), passes="scale-gradients")
    x = torch.randn(5, 2, 4)
    exported = torch.export.export(bio_model, (x,)).module()
    torch.testing.assert_close(exported(x), bio_model(x))


@pytest.mark.parametrize("twice", [False, True])
def test_every_weight_has_learning_rates_of_its_own(twice: bool) -> None:
    class Twice(Model):
        def forward(self, x: Tensor) -> Any:
            y, state = self.gru(x)
            if twice:
                y = y + self.gru(x.flip(0), state)[0]
            return self.fc(self.lstm(y)[0])

    model = Twice()
    bio_model, report = biofx.transform(model, passes="scale-gradients{nu=0.3}")
    x = torch.randn(5, 2, 4)
    assert torch.equal(bio_model(x), model(x))
    for each in (model, bio_model):
        each(x).square().sum().backward()
    for path in WEIGHTS:
        gradient, plain = bio_model.get_parameter(path).grad, model.get_parameter(path).grad
        owner, _, name = path.rpartition(".")
        place = f"{owner}.bio_mod" if name == "weight" else f"{owner}.bio_mod.{name}"
        factors = bio_model.get_buffer(f"{place}.fuzzy_learning_rate_parameters")
        assert factors.shape == plain.shape  # type: ignore[union-attr]
        assert factors.std() > 0.05
        torch.testing.assert_close(gradient, plain * factors)  # type: ignore[operator]
    names = [node.name for node in bio_model.graph.find_nodes(op="call_function", target=scale_gradient)]
    assert sorted(names) == sorted(
        f"{path.removesuffix('.weight').replace('.', '_')}_scaled" for path in WEIGHTS
    )
    told = {remark.message.partition(":")[0] for remark in report.passes[0].remarks if remark.layer == "lstm"}
    assert told == {"weight_ih_l0", "weight_hh_l0"}
