"""Weights as layers use them: expressions in graphs against the same computed here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx import BioConfig, Distribution
from biofx.diagnostics.check_signs import SignCount, count_signs
from biofx.diagnostics.effective_weight import effective_weights
from biofx.errors import InvariantError
from biofx.layers.constant_part import ConstantPart, Treatment, weight_uses
from biofx.operators.rate_ops import scale_gradient
from biofx.operators.sign_ops import constrain_sign
from biofx.plasticity.model_states import bio_modules

DALE = BioConfig(
    apply_dales_principle=True,
    dales_constrain_inputs=True,
    dales_constrain_readout=True,
    fuzzy_lr_distribution=Distribution.BASELINE,
)


class Weighted(nn.Module):
    """A weight of shape (4, 6) whose six columns have signs; subclasses say what is done to it."""

    first: Tensor
    second: Tensor
    index: Tensor
    rates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))
        self.register_buffer("first", torch.tensor([1, -1], dtype=torch.int8))
        self.register_buffer("second", torch.tensor([-1, 0, 1], dtype=torch.int8))
        self.register_buffer("index", torch.tensor([4, 0, 0, 1, 2, 3]))
        self.register_buffer("rates", torch.full((4, 6), 2.0))

    def signed(self) -> Tensor:
        sign = torch.index_select(torch.cat([self.first, self.second]), 0, self.index)
        return constrain_sign(self.weight, sign)

    @property
    def signs(self) -> Tensor:
        return torch.tensor([1, 1, 1, -1, -1, 0])


class BufferTracer(torch.fx.Tracer):
    proxy_buffer_attributes = True


def traced(model: nn.Module) -> torch.fx.GraphModule:
    return torch.fx.GraphModule(model, BufferTracer().trace(model))


def weight_node(graph_module: torch.fx.GraphModule) -> torch.fx.Node:
    (layer,) = graph_module.graph.find_nodes(op="call_function", target=F.linear)
    found = layer.args[1]
    assert isinstance(found, torch.fx.Node)
    return found


def counted(graph_module: torch.fx.GraphModule) -> SignCount:
    constants = ConstantPart(graph_module)
    (constraint,) = graph_module.graph.find_nodes(op="call_function", target=constrain_sign)
    uses = [use for use in weight_uses(constants) if constraint in use.constraints]
    return count_signs(constants, constraint, uses)


def number(found: Tensor) -> int:
    return int(found.sum())


# values


def test_weight_is_what_its_expression_computes() -> None:
    class Net(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            used = scale_gradient(self.signed(), self.rates)
            return F.linear(x, used.unflatten(0, (2, 2)).sum(1) * torch.ones(2, 1) + torch.arange(2)[:, None])

    model = Net()
    graph_module = traced(model)
    found = ConstantPart(graph_module).value(weight_node(graph_module))
    held = model.weight.detach()
    wrong = held * model.signs < 0
    signed = torch.where(wrong, 0.0, held)
    torch.testing.assert_close(found, signed.view(2, 2, 6).sum(1) + torch.tensor([[0.0], [1.0]]))
    assert not found.requires_grad


def test_value_is_that_of_this_moment() -> None:
    class Net(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.signed())

    graph_module = traced(Net())
    constants, node = ConstantPart(graph_module), weight_node(graph_module)
    before = constants.value(node)
    graph_module.get_parameter("weight").data.neg_()
    graph_module.get_buffer("first").neg_()
    graph_module.get_buffer("second").neg_()
    assert torch.equal(constants.value(node), -before)
    graph_module.register_buffer("first", torch.zeros(2, dtype=torch.int8))
    assert torch.equal(constants.value(node)[:, 1:3], graph_module.get_parameter("weight")[:, 1:3])


def test_long_expression_is_computed_without_recursion() -> None:
    class Net(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            used = self.weight
            for _ in range(3000):
                used = used + 1  # type: ignore[assignment]
            return F.linear(x, used)

    graph_module = traced(Net())
    found = ConstantPart(graph_module).value(weight_node(graph_module))
    torch.testing.assert_close(found, graph_module.get_parameter("weight").detach() + 3000)
    assert len(weight_uses(ConstantPart(graph_module))) == 1


@pytest.mark.parametrize("kind", ["random", "data", "in place", "module", "fails"])
def test_weight_that_is_no_constant_expression_is_refused(kind: str) -> None:
    class Net(Weighted):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Softplus()

        def forward(self, x: Tensor) -> Tensor:
            if kind == "random":
                return F.linear(x, F.dropout(self.weight, 0.5, True))
            if kind == "data":
                return F.linear(x, self.weight * x.mean())
            if kind == "in place":
                copied = self.weight.clone()
                copied.mul_(2)
                return F.linear(x, copied)
            if kind == "module":
                return F.linear(x, self.module(self.weight))
            return F.linear(x, self.weight + self.first)

    graph_module = traced(Net())
    state = torch.get_rng_state()
    message = "fails: The size of tensor" if kind == "fails" else "expected .* to follow from parameters"
    with pytest.raises(InvariantError, match=message):
        ConstantPart(graph_module).value(weight_node(graph_module))
    assert torch.equal(torch.get_rng_state(), state)


def test_computed_weight_of_a_layer_takes_no_step() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    bio, _ = biofx.transform(model, DALE)
    before = {name: value.clone() for name, value in bio.state_dict().items()}
    assert {fault.invariant for fault in biofx.check(bio).faults} == {"asked"}  # no sign can be placed
    effective_weights(bio, bio_modules(bio))
    assert all(torch.equal(value, before[name]) for name, value in bio.state_dict().items())


# ways


def test_ways_say_what_lies_between_parameter_and_reader() -> None:
    class Net(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            used = scale_gradient(self.signed(), self.rates)
            raw = F.linear(x, self.weight)
            half = F.linear(x, self.weight.t().chunk(2)[0].t())
            return F.linear(x, used), raw, half, self.weight.norm() * x  # type: ignore[return-value]

    graph_module = traced(Net())
    uses = weight_uses(ConstantPart(graph_module))
    assert {use.path for use in uses} == {"weight"}
    told = {
        (len(use.constraints), len(use.scalings), use.before, use.after, use.reader.name)
        for use in uses
        if use.reader is not None
    }
    assert told == {
        (0, 0, Treatment.NOTHING, Treatment.NOTHING, "linear"),
        (0, 0, Treatment.MOVED, Treatment.NOTHING, "linear_1"),
        (1, 1, Treatment.NOTHING, Treatment.NOTHING, "linear_2"),
        (0, 0, Treatment.COMPUTED, Treatment.NOTHING, "mul"),
    }


# signs


def test_signs_are_counted_where_the_weight_is_used() -> None:
    class Net(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.signed() - 0.2)

    model = Net()
    held = model.weight.detach()
    used = torch.where(held * model.signs < 0, 0.0, held) - 0.2
    found = counted(traced(model))
    assert found == SignCount(24, number(used * model.signs < 0), number(held * model.signs < 0))
    assert found.wrong > 6


def test_signs_move_with_a_weight_that_is_sliced_and_transposed() -> None:
    class Net(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            turned = self.signed().t()
            left, right = turned[:3], turned[3:]
            return x[:, :3] @ left + x[:, 3:] @ right

    model = Net()
    assert counted(traced(model)) == SignCount(24, 0, number(model.weight.detach() * model.signs < 0))


def test_square_weight_is_not_mistaken_for_its_transpose() -> None:
    class Net(nn.Module):
        sign: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5))
            self.register_buffer("sign", torch.tensor([1, -1, 1, -1, -1]))

        def forward(self, x: Tensor) -> Tensor:
            return x @ constrain_sign(self.weight, self.sign).t()

    found = counted(traced(Net()))
    assert (found.synapses, found.wrong) == (25, 0)
    assert found.wrong_raw > 0


def test_folded_weight_is_judged_behind_its_constraint() -> None:
    class Net(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.signed().unflatten(0, (2, 2)).sum(1))

    assert counted(traced(Net())).wrong == 0


def test_rows_that_are_free_do_not_count() -> None:
    class Net(Weighted):
        rows: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.tensor([1, 0, 0, 1], dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            sign = torch.cat([self.first, self.second, self.first[:1]])
            return F.linear(x, constrain_sign(self.weight, sign, rows=self.rows))

    model = Net()
    signs = torch.tensor([1, -1, -1, 0, 1, 1]) * torch.tensor([[1], [0], [0], [1]])
    wrong = number(model.weight.detach() * signs < 0)
    assert counted(traced(model)) == SignCount(24, 0, wrong)
    assert wrong > 0


# weights of a model


@pytest.mark.parametrize("method", ["project", "abs"])
def test_parameters_become_what_their_layers_use(mlp: nn.Module, method: str) -> None:
    bio, _ = biofx.transform(mlp, DALE.replace(dales_method=method, fuzzy_lr_distribution="uniform"))
    states = bio_modules(bio)
    for path, effective in effective_weights(bio, states).items():
        held = states[path].weight.detach()
        for raw in (held, -held):
            used, signs = effective(raw), states[path].signs()
            expected = raw.abs() * signs if method == "abs" else torch.where(raw * signs < 0, 0.0, raw)
            torch.testing.assert_close(used, expected)
            wrong = number(raw * signs < 0)
            assert (wrong == 0) is (raw is held)
            assert effective.count_signs(raw, used) == SignCount(raw.numel(), 0, wrong)


def test_weight_without_a_way_or_without_signs_is_used_as_it_is(mlp: nn.Module) -> None:
    bio = biofx.BioConverter()(nn.Sequential(mlp))
    states = bio_modules(bio)
    for path, effective in effective_weights(bio, states).items():
        weight = states[path].weight
        assert effective(weight) is weight
        assert effective.count_signs(weight, weight) is None


def test_weight_whose_constraint_is_gone_has_the_signs_of_its_state(mlp: nn.Module) -> None:
    bio, _ = biofx.transform(mlp, DALE)
    for node in list(bio.graph.find_nodes(op="call_function", target=constrain_sign)):
        node.replace_all_uses_with(node.args[0])
        bio.graph.erase_node(node)
    states = bio_modules(bio)
    effective: Any = effective_weights(bio, states)["2.weight"]
    raw = torch.randn(4, 6)
    wrong = number(raw * states["2.weight"].signs() < 0)
    assert effective.count_signs(raw, effective(raw)) == SignCount(24, wrong, wrong)
    assert wrong > 0


def test_constrained_use_is_meant_where_there_are_several() -> None:
    class Net(Weighted):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) + F.linear(x, self.signed())

    graph_module = traced(Net())
    state = biofx.BioModule(graph_module)
    effective = effective_weights(graph_module, {"weight": state})["weight"]
    raw = graph_module.get_parameter("weight").detach()
    assert number(effective(raw) * Net().signs < 0) == 0
