"""Rules for the blocks of transformers: norms and gains written out, attention with shared heads, reshapes.

What the analysis says is compared with an oracle that pushes one unit and looks at what moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from tests.analysis.nets import Net
from tests.analysis.oracle import columns_in, moved_columns, observed_groups, told_columns

SAME = [f"a[{number}]" for number in range(4)]


class Gained(nn.Module):
    """A gain, and what is done with it."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.gain, self.function = nn.Parameter(torch.ones(*shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.gain)


def rms(x: Tensor, gain: Tensor) -> Tensor:
    """As in Llama and T5."""
    return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rms_around_one(x: Tensor, gain: Tensor) -> Tensor:
    """As in Gemma."""
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return normed.type_as(x) * (1.0 + gain.to(x.dtype))


def written_layer_norm(x: Tensor, gain: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return gain * ((x - mean) / torch.sqrt(variance + 1e-6))


BETWEEN: dict[str, Callable[[], nn.Module]] = {
    "root mean square": lambda: Gained(rms, 4),
    "gain around one": lambda: Gained(rms_around_one, 4),
    "layer norm": lambda: Gained(written_layer_norm, 4),
    "unit length": lambda: Gained(lambda x, gain: gain * (x / x.norm(dim=-1, keepdim=True)), 4),
    "length by power": lambda: Gained(
        lambda x, gain: gain * (x / x.pow(2).sum(-1, keepdim=True).pow(0.5)), 1
    ),
    "layer scale": lambda: Gained(lambda x, gain: gain * x, 4),
    "one gain for all": lambda: Gained(lambda x, gain: x * gain, 1),
    "gain with axes in front": lambda: Gained(lambda x, gain: x * gain[None, None, :], 4),
    "square": lambda: Gained(lambda x, gain: gain * x**2, 4),
}


def between(name: str) -> nn.Module:
    return Net(
        lambda m, x: m.b(m.between(m.a(x))), a=nn.Linear(2, 4), between=BETWEEN[name](), b=nn.Linear(4, 3)
    )


@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_written_out_leaves_units_in_place(name: str) -> None:
    found = columns_in(observed_groups(between(name), torch.rand(2, 5, 2)))
    assert found["b.weight"] == SAME
    groups, moved = moved_columns(between(name), torch.rand(2, 5, 2, dtype=torch.float64), is_observed=True)
    told = told_columns(groups)["b.weight"]
    # a normalisation divides by what all units make up, so all move a little
    assert all(unit <= column for unit, column in zip(told, moved["b.weight"], strict=True))


def _by_value(m: Any, x: Tensor) -> Tensor:
    """Python decides, so that each layer has a graph of its own, and only a run says who feeds whom."""
    hidden = m.between(m.a(x)) if x.shape[0] and bool(x.isfinite().all()) else x
    return m.c(F.relu(m.b(hidden)))  # type: ignore[no-any-return]


def broken(between: nn.Module) -> nn.Module:
    layers = {"a": nn.Linear(2, 4), "between": between, "b": nn.Linear(4, 3), "c": nn.Linear(3, 2)}
    return Net(_by_value, **layers)


@pytest.mark.parametrize("name", BETWEEN)
def test_gains_that_are_written_out_are_kept_from_below_0(name: str) -> None:
    x = torch.randn(2, 5, 2)
    bio, report = biofx.transform(broken(BETWEEN[name]()), passes="constrain-signs", example_inputs=(x,))
    remark = next(r for r in report.remarks if r.layer == "between")
    assert remark.kind == "applied"
    assert remark.message.startswith("gains kept from below 0")
    around_one = name == "gain around one"
    with torch.no_grad():
        bio.get_parameter("between.gain").fill_(-3.0)
    torch.testing.assert_close(bio(x), bio(x * 2))  # all gains are held at 0, so nothing comes through
    with torch.no_grad():
        bio.get_parameter("between.gain").fill_(-0.5)
    assert torch.equal(bio(x), bio(x * 2)) != around_one  # 1 - 0.5 is no negative gain


def test_a_gain_held_at_0_does_not_learn_until_it_may_rise() -> None:
    model = broken(Gained(rms, 4))
    with torch.no_grad():
        model.get_parameter("between.gain")[:2] = torch.tensor([-1.0, 2.0])
    x = torch.randn(2, 5, 2)
    bio, report = biofx.transform(model, passes="constrain-signs", example_inputs=(x,))
    remark = next(r for r in report.remarks if r.layer == "between")
    assert remark.details["wrong"] == 1
    with torch.no_grad():
        by_hand = dict(bio.named_parameters())
        hidden = F.linear(x, by_hand["a.weight"], by_hand["a.bias"])
        normed = by_hand["between.gain"].clamp(min=0) * F.rms_norm(hidden, (4,), eps=1e-6)
        sign = bio.a.bio_mod.sign
        weight = torch.where(by_hand["b.weight"] * sign > 0, by_hand["b.weight"], 0)
        second = F.relu(F.linear(normed, weight, by_hand["b.bias"]))
        torch.testing.assert_close(bio(x), F.linear(second, by_hand["c.weight"], by_hand["c.bias"]))


def test_a_matrix_that_is_multiplied_is_no_gain() -> None:
    model = Net(
        lambda m, x: m.b(m.between(m.a(x))),
        a=nn.Linear(2, 4),
        between=Gained(lambda x, w: (x[..., None, :] * w).sum(-1), 4, 4),
        b=nn.Linear(4, 3),
    )
    found = columns_in(observed_groups(model, torch.rand(2, 5, 2)))
    assert found["b.weight"] == [f"open[{number}]" for number in range(4)]


ENDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "inverse": (lambda x: 1e-3 * x.reciprocal(), "falls as its argument rises"),
    "inverse root": (lambda x: torch.rsqrt(F.relu(x) + 1), "falls as its argument rises"),
    "negative power": (lambda x: (F.relu(x) + 1) ** -2, "falls as its argument rises"),
    "power of the input": (lambda x: x ** x.sigmoid(), "exponent is known only when it runs"),
    "less others": (lambda x: x - x.flip(-1), "it subtracts activity"),
    "mean that may be negative": (lambda x: x / x.mean(-1, keepdim=True), "may be negative"),
}


@pytest.mark.parametrize("name", ENDS)
def test_where_units_end(name: str) -> None:
    function, reason = ENDS[name]
    model = Net(lambda m, x: m.b(function(m.a(x))), a=nn.Linear(2, 4), b=nn.Linear(4, 3))
    groups = observed_groups(model, torch.rand(2, 5, 2))
    assert any(reason in text for text in groups.ends.values())
    assert columns_in(groups)["b.weight"][0].startswith("open")


def _residual(m: Any, x: Tensor) -> Tensor:
    rows = m.e(x)
    return m.c(rows + m.b(m.norm(rows)))  # type: ignore[no-any-return]


def test_rows_that_are_looked_up_are_units_of_the_residual_stream() -> None:
    model = Net(
        _residual,
        e=nn.Embedding(9, 4),
        norm=Gained(rms, 4),
        b=nn.Linear(4, 4),
        c=nn.Linear(4, 2),
    )
    groups = observed_groups(model, torch.tensor([[1, 2], [3, 0]]))
    by_path = {reading.site.parameter_path: reading.units for reading in groups.readings}
    assert torch.equal(groups.representatives(by_path["b.weight"]), groups.made_by("b.weight"))
    assert torch.equal(groups.representatives(by_path["c.weight"]), groups.made_by("b.weight"))


def _shared_heads(m: Any, x: Tensor) -> Tensor:
    """Two heads of values for four of queries, as scaled_dot_product_attention does it by itself."""
    batch, steps, _ = x.shape
    query = m.query(x).view(batch, steps, 4, 3).transpose(1, 2)
    key, value = (layer(x).view(batch, steps, 2, 3).transpose(1, 2) for layer in (m.key, m.value))
    mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return m.out(mixed.transpose(1, 2).reshape(batch, steps, 12))  # type: ignore[no-any-return]


def test_values_of_a_shared_head_are_read_once_for_each_query() -> None:
    model = Net(
        _shared_heads,
        query=nn.Linear(5, 12),
        key=nn.Linear(5, 6),
        value=nn.Linear(5, 6),
        out=nn.Linear(12, 2),
    )
    expected = [f"value[{unit}]" for unit in (0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5)]
    assert columns_in(observed_groups(model, torch.rand(2, 7, 5)))["out.weight"] == expected
    groups, moved = moved_columns(model, torch.rand(2, 7, 5, dtype=torch.float64), is_observed=True)
    values = set(groups.made_by("value.weight").tolist())
    assert [column & values for column in moved["out.weight"]] == told_columns(groups)["out.weight"]


def test_without_an_observed_run_graphs_stay_what_they_were() -> None:
    """Files hold the text of a graph, and compare it when they are loaded."""
    for name in ("root mean square", "layer scale"):
        report = biofx.transform(between(name), passes="constrain-signs").report
        assert not any(remark.layer == "between" for remark in report.remarks)


# weights that a forward uses by itself


class Uses(nn.Module):
    """A parameter, and what is done with it."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(*shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def experts(x: Tensor, weight: Tensor) -> Tensor:
    """A stack of ``(out, in)`` as in mixtures of experts: the first three rows to the first expert."""
    ends = torch.tensor([3, x.shape[0]], dtype=torch.int32)
    return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)


def causal(x: Tensor, weight: Tensor) -> Tensor:
    """As Mamba does it by itself: a depthwise convolution with a weight that is squeezed and unsqueezed."""
    weight = weight.squeeze(1)
    return F.conv1d(x.mT, weight.unsqueeze(1), padding=2, groups=4)[..., : x.shape[1]].mT


USED: dict[str, tuple[Callable[[], Uses], tuple[int, ...], int, list[int]]] = {
    "in front": (lambda: Uses(lambda x, w: (w @ x.mT).mT, 6, 4), (2, 5, 2), 1, [0, 1, 2, 3]),
    "in front of a vector": (lambda: Uses(lambda x, w: w @ x, 6, 4), (2,), 1, [0, 1, 2, 3]),
    "stack": (lambda: Uses(experts, 2, 8, 4), (8, 2), 2, [0, 1, 2, 3]),
    "causal convolution": (lambda: Uses(causal, 4, 1, 3), (2, 5, 2), 0, [0, 1, 2, 3]),
    "reshaped": (
        lambda: Uses(lambda x, w: F.linear(x, w.reshape(2, 3, 4).flatten(0, 1)), 6, 4),
        (2, 5, 2),
        1,
        [0, 1, 2, 3],
    ),
}


def between_layers(name: str, readers: int) -> nn.Module:
    return Net(
        lambda m, x: m.b(m.uses(m.a(x))), a=nn.Linear(2, 4), uses=USED[name][0](), b=nn.Linear(readers, 3)
    )


@pytest.mark.parametrize("name", USED)
def test_what_a_weight_reads_that_a_forward_uses_by_itself(name: str) -> None:
    make, shape, axis, expected = USED[name]
    outputs = make().weight.shape[axis - 1] if name != "causal convolution" else 4
    model = between_layers(name, outputs)
    x = torch.randn(shape)
    groups = observed_groups(model, x)
    found = columns_in(groups)
    assert found["uses.weight"] == [f"a[{number}]" for number in expected]
    assert found["b.weight"] == [f"uses[{number}]" for number in range(outputs)]
    # alone, a unit gives a gradient to the weights that it is presynaptic to and to no others
    weight = model.get_parameter("uses.weight")
    for unit in range(4):
        only = torch.zeros(4)
        only[unit] = 1
        handle = model.get_submodule("a").register_forward_hook(
            lambda m, given, out, only=only: only + 0 * out
        )
        (gradient,) = torch.autograd.grad(model(x).square().sum(), weight)
        handle.remove()
        meets = gradient.movedim(axis, 0).flatten(1).abs().sum(1) > 0
        assert meets.nonzero().flatten().tolist() == [unit]


def test_signs_of_a_stack_are_those_of_the_units_for_each_of_its_matrices() -> None:
    def by_value(m: Any, x: Tensor) -> Tensor:
        hidden = m.uses(F.relu(m.a(x))) if bool(x.isfinite().all()) else x
        return m.c(F.relu(m.b(hidden)))  # type: ignore[no-any-return]

    model = Net(by_value, a=nn.Linear(2, 4), uses=USED["stack"][0](), b=nn.Linear(8, 3), c=nn.Linear(3, 2))
    x = torch.randn(8, 2)
    passes = 'constrain-signs{initialisation="keep"}'
    bio, report = biofx.transform(model, passes=passes, example_inputs=(x,))
    assert {remark.layer for remark in report.remarks if remark.kind == "applied"} == {"uses", "b"}
    sign = bio.get_buffer("a.bio_mod.sign")
    held = {name: value.detach() for name, value in bio.named_parameters()}
    weight = held["uses.weight"].where(held["uses.weight"] * sign > 0, 0)  # (expert, out, in)
    units = F.relu(F.linear(x, held["a.weight"], held["a.bias"]))
    hidden = torch.cat([units[:3] @ weight[0].T, units[3:] @ weight[1].T])
    second = held["b.weight"].where(held["b.weight"] * bio.get_buffer("uses.bio_mod.sign") > 0, 0)
    expected = F.linear(F.relu(F.linear(hidden, second, held["b.bias"])), held["c.weight"], held["c.bias"])
    torch.testing.assert_close(bio(x), expected)
    assert biofx.check(bio).ok


def test_a_product_with_other_activity_along_another_axis_ends_units_and_compares_nothing() -> None:
    """As a state-space model reads its state out: the state's units are rows, and columns are summed."""
    model = Net(
        lambda m, x: m.out((m.state(x).unsqueeze(-1) * m.rates(x)[:, None]) @ m.read(x)[..., None]),
        state=nn.Linear(2, 4),
        rates=nn.Linear(2, 3),
        read=nn.Linear(2, 3),
        out=nn.Linear(1, 2),
    )
    groups = observed_groups(model, torch.randn(5, 2))
    assert "it mixes units by the activity of others, which may be negative" in groups.ends.values()
    by_path = {reading.site.parameter_path: reading.site for reading in groups.readings}
    for name in ("state", "rates", "read"):
        assert not groups.exempt_rows(by_path[f"{name}.weight"]).any()


def _routed(m: Any, x: Tensor) -> Tensor:
    """Rows of activity in an order that activity decides, and back, each weighted by its share."""
    hidden = F.relu(m.a(x))
    share, choice = torch.softmax(m.router(hidden), -1).topk(1, -1)
    order = choice[:, 0].argsort()
    chosen = m.b(hidden[order]) * share[order]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return m.c(chosen[back])  # type: ignore[no-any-return]


def test_units_are_followed_through_rows_that_activity_reorders() -> None:
    model = Net(_routed, a=nn.Linear(2, 4), router=nn.Linear(4, 3), b=nn.Linear(4, 5), c=nn.Linear(5, 2))
    x = torch.randn(6, 2)
    groups = observed_groups(model, x)
    found = columns_in(groups)
    assert found["b.weight"] == found["router.weight"] == SAME
    assert found["c.weight"] == [f"b[{number}]" for number in range(5)]
    assert next(r for r in groups.readings if r.site.parameter_path == "b.weight").nonnegative
    assert "values decide in which order its entries are" in groups.ends.values()
    for unit in range(5):  # alone, a unit gives a gradient to the weights that it is presynaptic to
        only = torch.zeros(5)
        only[unit] = 1
        handle = model.get_submodule("b").register_forward_hook(
            lambda m, given, out, only=only: only + 0 * out
        )
        (gradient,) = torch.autograd.grad(model(x).square().sum(), model.get_parameter("c.weight"))
        handle.remove()
        assert (gradient.abs().sum(0) > 0).nonzero().flatten().tolist() == [unit]
