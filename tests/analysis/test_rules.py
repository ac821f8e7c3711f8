"""Each rule of the table: the exact columns, written out, and the oracle over chains drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from biofx.operators.split_ops import pool_synapses
from tests.analysis.nets import Net
from tests.analysis.oracle import columns_of, moved_columns, told_columns


def view_and_permute(x: Tensor, groups: int) -> Tensor:
    """Channel shuffle as it is written out in ShuffleNet."""
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, -1, height, width)


def largest_and_where(x: Tensor) -> tuple[Tensor, Tensor]:
    return F.adaptive_max_pool2d(x, 2, return_indices=True)


def by_size(x: Tensor) -> Tensor:
    return x.view(x.size(0), x.size(1), x.size(2), x.size(3))


def a(*numbers: int) -> list[str]:
    return [f"a[{number}]" for number in numbers]


SAME = a(0, 1, 2, 3)
BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    **{
        name: (getattr(F, name), SAME)
        for name in (
            "relu",
            "gelu",
            "silu",
            "elu",
            "leaky_relu",
            "softplus",
            "hardswish",
            "relu6",
            "mish",
            "selu",
        )
    },
    "tanh": (torch.tanh, SAME),
    "sigmoid": (lambda x: x.sigmoid(), SAME),
    "clamp": (lambda x: x.clamp(0, 9), SAME),
    "max pool": (lambda x: F.max_pool2d(x, 2), SAME),
    "max pool with places": (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], SAME),
    "adaptive pool with places": (lambda x: largest_and_where(x)[0], SAME),
    "size of a pool": (lambda x: by_size(F.max_pool2d(x, 2, return_indices=True)[0]), SAME),
    "average pool": (lambda x: F.avg_pool2d(x, 2), SAME),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, 1), SAME),
    "adaptive maximum": (lambda x: F.adaptive_max_pool2d(x, 2), SAME),
    "dropout": (lambda x: F.dropout(x, 0.5, False), SAME),
    "channel dropout": (lambda x: F.dropout2d(x, 0.5, False), SAME),
    "shuffle called": (lambda x: F.channel_shuffle(x, 2), a(0, 2, 1, 3)),
    "shuffle by view": (lambda x: view_and_permute(x, 2), a(0, 2, 1, 3)),
    "shuffle by unflatten": (
        lambda x: x.unflatten(1, (2, -1)).permute(0, 2, 1, 3, 4).flatten(1, 2),
        a(0, 2, 1, 3),
    ),
    "pixels to channels": (
        lambda x: F.pixel_unshuffle(x, 2),
        a(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
    ),
    "channels to pixels": (lambda x: F.pixel_shuffle(x, 2), a(0)),
    "padding of space": (lambda x: F.pad(x, (1, 1, 2, 0)), SAME),
    "padding of channels": (
        lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)),
        ["constant[0]", *SAME, "constant[0]", "constant[1]"],
    ),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0), SAME),
    "chunk and cat": (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), a(2, 3, 0, 1)),
    "split": (lambda x: x.split([1, 3], 1)[1], a(1, 2, 3)),
    "slice": (lambda x: x[:, 1:3], a(1, 2)),
    "every other": (lambda x: x[:, ::2], a(0, 2)),
    "cat with itself": (lambda x: torch.cat([x, F.relu(x)], -3), SAME + SAME),
    "stack in front": (lambda x: torch.stack([x, x], 1).flatten(1, 2), SAME + SAME),
    "stack behind": (lambda x: torch.stack([x, x], 2).flatten(1, 2), a(0, 0, 1, 1, 2, 2, 3, 3)),
    "there and back": (lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2), SAME),
    "view": (lambda x: x.view(x.size(0), 4, x.size(2), x.size(3)), SAME),
    "unsqueeze and squeeze": (lambda x: x.unsqueeze(2).squeeze(2), SAME),
    "roll in space": (lambda x: torch.roll(x, 1, 2), SAME),
    "sum with itself": (lambda x: x + x.flip(2), SAME),
    "own gate": (lambda x: x * torch.sigmoid(x.mean((2, 3)))[:, :, None, None], SAME),
    "scaled": (lambda x: x * 2 + 1, SAME),
    "divided by a size": (lambda x: x / x.shape[2], SAME),
    "pool of synapses": (lambda x: pool_synapses(x, gamma=2, channel_axis=-3), a(0, 0, 2, 2)),
}


def between(function: Callable[[Tensor], Tensor], readers: int) -> nn.Module:
    return Net(lambda m, x: m.b(function(m.a(x))), a=nn.Conv2d(1, 4, 1), b=nn.Conv2d(readers, 3, 1))


@pytest.mark.parametrize("name", BETWEEN)
def test_columns_written_out(name: str) -> None:
    function, expected = BETWEEN[name]
    model = between(function, len(expected))
    assert columns_of(model)["b.weight"] == expected
    groups, moved = moved_columns(model, 1 + torch.rand(2, 1, 6, 6, dtype=torch.float64))
    if name != "clamp" and not name.startswith(("tanh", "sigmoid", "relu6", "hard")):  # those saturate
        assert moved == told_columns(groups)
    assert not groups.ends


WHOLE: dict[str, tuple[nn.Module, dict[str, list[str]]]] = {
    "residual": (
        Net(
            lambda m, x: m.c(F.relu(m.a(x) + m.n(m.b(F.relu(m.a(x)))))),
            a=nn.Conv2d(1, 4, 1),
            n=nn.BatchNorm2d(4),
            b=nn.Conv2d(4, 4, 1),
            c=nn.Conv2d(4, 2, 1),
        ),
        {"b.weight": SAME, "c.weight": SAME},
    ),
    "product": (
        Net(
            lambda m, x: m.c(F.relu(m.a(x)) * torch.sigmoid(m.b(x))),
            a=nn.Conv2d(1, 4, 1),
            b=nn.Conv2d(1, 4, 1),
            c=nn.Conv2d(4, 2, 1),
        ),
        {"c.weight": SAME},
    ),
    "concatenation": (
        Net(
            lambda m, x: m.c(torch.cat([F.relu(m.b(m.a(x))), m.a(x), x], 1)),
            a=nn.Conv2d(1, 2, 1),
            b=nn.Conv2d(2, 3, 1),
            c=nn.Conv2d(6, 2, 1),
        ),
        {"c.weight": ["b[0]", "b[1]", "b[2]", "a[0]", "a[1]", "input[0]"]},
    ),
    "flattened map": (
        Net(lambda m, x: m.b(m.a(x).flatten(1)), a=nn.Conv2d(1, 2, 1), b=nn.Linear(72, 2)),
        {"b.weight": a(*[0] * 36, *[1] * 36)},
    ),
    "view with numbers": (
        Net(lambda m, x: m.b(m.a(x).view(-1, 72)), a=nn.Conv2d(1, 2, 1), b=nn.Linear(72, 2)),
        {"b.weight": a(*[0] * 36, *[1] * 36)},
    ),
    "squeezed by view": (
        Net(
            lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), 1).view(x.size(0), 4)),
            a=nn.Conv2d(1, 4, 1),
            b=nn.Linear(4, 2),
        ),
        {"b.weight": SAME},
    ),
    "grouped and depthwise": (
        Net(
            lambda m, x: m.c(m.b(m.a(x))),
            a=nn.Conv2d(1, 4, 1),
            b=nn.Conv2d(4, 8, 1, groups=4),
            c=nn.Conv2d(8, 2, 1, groups=2),
        ),
        {"b.weight": SAME, "c.weight": [f"b[{number}]" for number in range(8)]},
    ),
    "transposed": (
        Net(
            lambda m, x: m.c(m.b(m.a(x))),
            a=nn.ConvTranspose2d(1, 4, 2),
            b=nn.ConvTranspose2d(4, 6, 2, groups=2),
            c=nn.Conv2d(6, 2, 1),
        ),
        {"b.weight": SAME, "c.weight": [f"b[{number}]" for number in range(6)]},
    ),
    "unknown": (
        Net(lambda m, x: m.b(torch.cumsum(m.a(x), 1)), a=nn.Conv2d(1, 4, 1), b=nn.Conv2d(4, 2, 1)),
        {"b.weight": ["open[0]", "open[1]", "open[2]", "open[3]"]},
    ),
    "one unit added to many": (
        Net(
            lambda m, x: m.c(m.a(x) + m.b(x)),
            a=nn.Conv2d(1, 4, 1),
            b=nn.Conv2d(1, 1, 1),
            c=nn.Conv2d(4, 2, 1),
        ),
        {"c.weight": ["open[0]", "open[1]", "open[2]", "open[3]"]},
    ),
    "turned over": (
        Net(lambda m, x: m.b(1 - m.a(x)), a=nn.Conv2d(1, 4, 1), b=nn.Conv2d(4, 2, 1)),
        {"b.weight": ["open[0]", "open[1]", "open[2]", "open[3]"]},
    ),
    **{
        f"norm {type(norm).__name__}": (
            Net(lambda m, x: m.b(m.n(m.a(x))), a=nn.Conv2d(1, 4, 1), n=norm, b=nn.Conv2d(4, 2, 1)),
            {"b.weight": SAME},
        )
        for norm in (nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm([4, 6, 6]))
    },
    **{
        f"pool {axes}d": (
            Net(
                lambda m, x: m.b(m.q(m.p(m.a(x)))),
                a=getattr(nn, f"Conv{axes}d")(1, 4, 1),
                p=getattr(nn, f"MaxPool{axes}d")(2),
                q=getattr(nn, f"AdaptiveAvgPool{axes}d")(1),
                b=getattr(nn, f"Conv{axes}d")(4, 2, 1),
            ),
            {"b.weight": SAME},
        )
        for axes in (1, 2, 3)
    },
}


@pytest.mark.parametrize("name", WHOLE)
def test_models_written_out(name: str) -> None:
    model, expected = WHOLE[name]
    found = columns_of(model)
    assert {path: found[path] for path in expected} == expected
    groups = biofx.unit_groups(biofx.capture(model))
    assert bool(groups.ends) == ("open[0]" in found["c.weight" if "c.weight" in found else "b.weight"])


def test_units_of_a_recurrent_layer_speak_to_themselves_and_to_the_layer_above() -> None:
    for kind in (nn.GRU, nn.LSTM, nn.RNN):
        model = Net(
            lambda m, x: m.b(m.a(x)[0]), a=kind(3, 2, num_layers=2, bidirectional=True), b=nn.Linear(4, 2)
        )
        found = columns_of(model)
        for layer in (0, 1):
            for way in ("", "_reverse"):
                own = f"a.weight_hh_l{layer}{way}"
                assert found[own] == [f"{own}[0]", f"{own}[1]"]
        first = [f"a.weight_hh_l0{way}[{unit}]" for way in ("", "_reverse") for unit in (0, 1)]
        second = [name.replace("l0", "l1") for name in first]
        assert found["a.weight_ih_l1"] == found["a.weight_ih_l1_reverse"] == first
        assert found["b.weight"] == second
        assert found["a.weight_ih_l0"] == found["a.weight_ih_l0_reverse"]
        assert found["a.weight_ih_l0"] == ["input[0]", "input[1]", "input[2]"]


def test_attention_passes_values_on_and_exempts_queries_and_keys() -> None:
    model = Net(
        lambda m, x: m.b(m.attend(m.a(x), m.a(x), m.a(x), need_weights=False)[0]),
        a=nn.Linear(3, 4),
        attend=nn.MultiheadAttention(4, 2, batch_first=True),
        b=nn.Linear(4, 2),
    )
    found = columns_of(model)
    assert found["attend.in_proj_weight"] == SAME
    assert found["attend.out_proj.weight"] == [f"attend.in_proj_weight[{unit}]" for unit in range(8, 12)]
    assert found["b.weight"] == [f"attend.out_proj[{unit}]" for unit in range(4)]


def _by_hand(m: Any, x: Tensor) -> Tensor:
    batch, steps, _ = x.shape
    query, key, value = (
        layer(x).view(batch, steps, 2, 3).transpose(1, 2) for layer in (m.query, m.key, m.value)
    )
    weights = torch.softmax(query @ key.transpose(-2, -1) / 3**0.5, -1)
    return m.out((weights @ value).transpose(1, 2).reshape(batch, steps, 6))  # type: ignore[no-any-return]


def _fused(m: Any, x: Tensor) -> Tensor:
    batch, steps, _ = x.shape
    query, key, value = m.joint(x).reshape(batch, steps, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(query, key, value)
    return m.out(mixed.transpose(1, 2).reshape(batch, steps, 6))  # type: ignore[no-any-return]


def test_attention_written_by_hand() -> None:
    apart = Net(
        _by_hand, query=nn.Linear(5, 6), key=nn.Linear(5, 6), value=nn.Linear(5, 6), out=nn.Linear(6, 2)
    )
    fused = Net(_fused, joint=nn.Linear(5, 18), out=nn.Linear(6, 2))
    groups = biofx.unit_groups(biofx.capture(apart))
    by_path = {reading.site.parameter_path: reading for reading in groups.readings}
    assert (
        groups.representatives(by_path["out.weight"].units).tolist()
        == groups.made_by("value.weight").tolist()
    )
    exempt = {path: groups.exempt_rows(reading.site).tolist() for path, reading in by_path.items()}
    assert exempt["query.weight"] == exempt["key.weight"] == [True] * 6
    assert exempt["value.weight"] == [False] * 6
    groups = biofx.unit_groups(biofx.capture(fused))
    by_path = {reading.site.parameter_path: reading for reading in groups.readings}
    assert (
        groups.representatives(by_path["out.weight"].units).tolist()
        == groups.made_by("joint.weight")[12:].tolist()
    )
    assert groups.exempt_rows(by_path["joint.weight"].site).tolist() == [True] * 12 + [False] * 6


def test_a_rule_of_ones_own_takes_the_place_of_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from biofx.analysis.forward import TABLE, Entry

    model = between(lambda x: torch.cumsum(x, 2), 4)
    assert columns_of(model)["b.weight"][0] == "open[0]"
    monkeypatch.setitem(TABLE, torch.cumsum, Entry())
    biofx.add_unit_rule(torch.cumsum, lambda call: call.keeps())
    assert columns_of(model)["b.weight"] == SAME


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: F.relu(x),
    "pool": lambda x: F.max_pool2d(x, 3, 1, 1),
    "double": lambda x: torch.cat([x, x * 2], 1),
    "swap": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "shuffle": lambda x: view_and_permute(x, 2),
    "called": lambda x: F.channel_shuffle(x, 2),
    "upscale": lambda x: F.interpolate(x, scale_factor=2.0),
    "unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "front": lambda x: x[:, :2],
    "last": lambda x: x.permute(0, 2, 3, 1).flip(1).permute(0, 3, 1, 2),
    "stack": lambda x: torch.stack([x, x.flip(3)], 2).flatten(1, 2),
    "sum": lambda x: x + torch.cat(x.chunk(2, 1)[::-1], 1),
    "gate": lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True) * 1e-4),
    "pad": lambda x: F.pad(x, (1, 1, 1, 1)),
    "synapses": lambda x: pool_synapses(x, gamma=2, channel_axis=-3),
    "away": lambda x: x.flatten(2).unflatten(2, (2, -1)),
}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4), st.booleans())
def test_columns_are_those_that_move(names: list[str], is_flat: bool) -> None:
    def between_layers(x: Tensor) -> Tensor:
        for name in names:
            x = STEPS[name](x)
        return x.flatten(1) if is_flat else x

    try:
        made = between_layers(torch.ones(1, 4, 4, 4))
    except RuntimeError:  # torch refuses: the map is too small by then
        return
    if made.shape[1] > 600:
        return
    reader = nn.Linear(made.shape[1], 2) if is_flat else nn.Conv2d(made.shape[1], 2, 1)
    model = Net(lambda m, x: m.b(between_layers(m.a(x))), a=nn.Conv2d(1, 4, 1), b=reader)
    with torch.no_grad():
        model.a.weight.abs_()  # type: ignore[operator,union-attr]
        model.a.bias.fill_(0.1)  # type: ignore[operator,union-attr]
    groups, moved = moved_columns(model, 1 + torch.rand(2, 1, 4, 4, dtype=torch.float64))
    told = told_columns(groups)
    if groups.ends:  # sizes that are not known may leave a reshape open, and then it is refused
        assert {"stack", "shuffle"} & set(names)
        return
    if not (is_flat and "pad" in names):
        assert moved == told
    for path, found in moved.items():  # the border of a padded map is constant, and so no unit moves it
        assert all(units <= claimed for units, claimed in zip(found, told[path], strict=True))
