from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.nn import functional as F

import biofx
from biofx.layers.sites import find_sites
from biofx.passes import ConstrainSigns, SplitWeights
from biofx.plasticity import BioModule
from biofx.plasticity.model_states import bio_module_at
from biofx.select import Override
from tests.analysis.nets import Net


def _conv(inputs: int, outputs: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)


def mlp() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(
        nn.Linear(5, 8),
        nn.ReLU(),
        nn.Linear(8, 7),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(7, 6),
        nn.ReLU(),
        nn.Linear(6, 3),
    )
    return model, torch.randn(6, 5)


def _residual(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.n0(m.stem(x)))
    x = F.relu(x + m.n1(m.conv(x)))
    x = F.relu(x + m.n2(m.more(x)))
    return m.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def residual() -> tuple[nn.Module, Tensor]:
    norms = {f"n{number}": nn.BatchNorm2d(4) for number in range(3)}
    model = Net(
        _residual,
        stem=_conv(1, 4),
        conv=_conv(4, 4),
        more=_conv(4, 4, bias=False),
        fc=nn.Linear(4, 3),
        **norms,
    )
    return model, torch.randn(3, 1, 5, 5)


def _dense(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.n(m.stem(x)))
    x = torch.cat([F.relu(m.grow(x)), x], 1)
    x = torch.cat([x, F.relu(m.more(x))], 1)
    return m.fc(torch.flatten(F.avg_pool2d(x, 2), 1))  # type: ignore[no-any-return]


def dense() -> tuple[nn.Module, Tensor]:
    model = Net(
        _dense, stem=_conv(1, 4), n=nn.BatchNorm2d(4), grow=_conv(4, 3), more=_conv(7, 2), fc=nn.Linear(36, 4)
    )
    return model, torch.randn(3, 1, 5, 5)


def _grouped(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.n(m.b(F.channel_shuffle(F.relu(m.a(x)), 2))))
    return m.fc(F.relu(m.depthwise(x)).mean((2, 3)))  # type: ignore[no-any-return]


def grouped() -> tuple[nn.Module, Tensor]:
    model = Net(
        _grouped,
        a=_conv(1, 4),
        b=_conv(4, 6, groups=2),
        n=nn.BatchNorm2d(6),
        depthwise=_conv(6, 6, groups=6),
        fc=nn.Linear(6, 2),
    )
    return model, torch.randn(3, 1, 5, 5)


def _transposed(m: Any, x: Tensor) -> Tensor:
    first = F.relu(m.a(x))
    low = F.relu(m.b(F.avg_pool2d(first, 2)))
    return m.c(torch.cat([F.relu(m.n(m.up(low))), first], 1))  # type: ignore[no-any-return]


def transposed() -> tuple[nn.Module, Tensor]:
    model = Net(
        _transposed,
        a=_conv(1, 4),
        b=_conv(4, 4),
        up=nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
        n=nn.BatchNorm2d(6),
        c=_conv(10, 2),
    )
    return model, torch.randn(2, 1, 4, 4)


MODELS = {"mlp": mlp, "residual": residual, "dense": dense, "grouped": grouped, "transposed": transposed}


def shaken(model: nn.Module) -> nn.Module:
    """Give batch normalisations gains of both signs and moments of their own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            assert module.running_var is not None
            nn.init.normal_(module.weight)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def constrained(model: nn.Module, **options: Any) -> biofx.BioGraphModule:
    return biofx.transform(model, passes=ConstrainSigns(constrain_readout=True, **options))[0]


def signs_by_column(bio: biofx.BioGraphModule) -> dict[str, list[int]]:
    """The signs that each constrained weight reads."""
    return {
        state.path: state.presynaptic_signs().tolist()
        for state in bio.modules()
        if isinstance(state, BioModule) and state.is_constrained
    }


class _Drives(Interpreter):
    """Cuts a running graph behind every layer, and keeps what goes into the cuts and comes out of them."""

    def __init__(self, bio: biofx.BioGraphModule) -> None:
        super().__init__(bio)
        self.sites = {site.node: site for site in find_sites(bio).found}
        self.drive: dict[Node, Tensor] = {}
        self.activity: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n not in self.sites:
            return result
        self.drive[n] = result
        self.activity[n] = result.detach().requires_grad_()
        return self.activity[n].clone()


@pytest.mark.parametrize("initialisation", ["balanced", "keep"])
@pytest.mark.parametrize("method", ["project", "abs"])
@pytest.mark.parametrize("name", MODELS)
def test_every_drive_moves_with_the_sign_of_the_unit(name: str, method: str, initialisation: str) -> None:
    model, x = MODELS[name]()
    bio = constrained(shaken(model), method=method, initialisation=initialisation).double().eval()
    groups = biofx.unit_groups(bio)
    sign_of: dict[int, int] = {}
    for reading in groups.readings:
        columns = signs_by_column(bio).get(reading.site.parameter_path)
        for unit, sign in zip(
            groups.representatives(reading.units).tolist(), columns or (), strict=columns is not None
        ):
            assert sign_of.setdefault(unit, sign) == sign
    run = _Drives(bio)
    run.run(x.double())
    moved = 0
    for reader, drive in run.drive.items():
        if run.sites[reader].parameter_path not in signs_by_column(bio):
            continue
        for channel in drive.movedim(run.sites[reader].kind.channel_axis, 0):
            slopes: tuple[Tensor | None, ...] = torch.autograd.grad(
                channel.sum(), list(run.activity.values()), retain_graph=True, allow_unused=True
            )
            for maker, slope in zip(run.activity, slopes, strict=True):
                if slope is None:
                    continue
                site = run.sites[maker]
                units = groups.representatives(groups.made_by(site.parameter_path)).tolist()
                for unit, entries in zip(units, slope.movedim(site.kind.channel_axis, 0), strict=True):
                    assert bool((entries * sign_of[unit] >= 0).all())
                    moved += int((entries != 0).sum())
    assert moved > 50


def tensors_of_signs(bio: nn.Module) -> list[str]:
    return [key for key in bio.state_dict() if key.endswith("sign")]


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("mlp", ["0", "2", "5"]),
        ("residual", ["stem"]),
        ("dense", ["stem", "grow", "more"]),
        ("grouped", ["a", "b", "depthwise"]),
        ("transposed", ["a", "b", "up"]),
    ],
)
def test_signs_are_kept_once_with_the_layer_that_makes_the_units(name: str, keys: list[str]) -> None:
    model, _ = MODELS[name]()
    bio = constrained(model)
    given = [key for key in tensors_of_signs(bio) if bio.get_buffer(key).any()]
    assert sorted(given) == sorted(f"{key}.bio_mod.sign" for key in keys)
    for key in keys:
        signs = bio.get_buffer(f"{key}.bio_mod.sign")
        assert signs.dtype == torch.float32
        assert int((signs == 1).sum()) == round(len(signs) / 2)


def turned(bio: nn.Module) -> nn.Module:
    """Turn all signs over where they are kept."""
    for key in tensors_of_signs(bio):
        bio.get_buffer(key).neg_()
    return bio


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "survive", [copy.deepcopy, lambda bio: pickle.loads(pickle.dumps(bio))], ids=["deepcopy", "pickle"]
)
def test_a_copy_reads_its_own_signs(name: str, survive: Callable[[Any], Any]) -> None:
    bio = constrained(MODELS[name]()[0])
    before = signs_by_column(bio)
    other = survive(bio)
    assert signs_by_column(other) == before
    turned(other)
    assert signs_by_column(bio) == before
    assert signs_by_column(other) == {path: [-sign for sign in signs] for path, signs in before.items()}


@pytest.mark.parametrize("name", MODELS)
def test_signs_go_with_the_state_dict_and_survive_a_change_of_type(name: str) -> None:
    model, x = MODELS[name]()
    bio, other = constrained(model), constrained(model, seed=9)
    assert signs_by_column(bio) != signs_by_column(other)
    other.load_state_dict(bio.state_dict())
    assert signs_by_column(bio) == signs_by_column(other)
    torch.testing.assert_close(other.eval()(x), bio.eval()(x), rtol=0, atol=0)
    before = signs_by_column(bio)
    wide = bio.to(torch.float64)
    assert signs_by_column(wide) == before
    assert wide(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", MODELS)
def test_order_of_application_does_not_matter(name: str) -> None:
    model, _ = MODELS[name]()
    expected = signs_by_column(constrained(model, initialisation="keep"))
    layers = [path.rpartition(".")[0] for path in expected]
    for order in (layers, layers[::-1]):
        bio: nn.Module = model
        for layer in order:
            bio = constrained(bio, only=layer, initialisation="keep")
        assert isinstance(bio, biofx.BioGraphModule)
        assert signs_by_column(bio) == expected
    again, report = biofx.transform(bio, passes=ConstrainSigns(constrain_readout=True, seed=4))
    assert signs_by_column(again) == expected
    assert not report.modified


def override(selector: str, **options: Any) -> Override:
    return Override(selector, tuple(options.items()))


def test_given_signs_are_kept_at_every_reader() -> None:
    given = (1, -1, -1, 1)
    model, _ = residual()
    bio = constrained(model, overrides=(override("stem", signs=given),))
    for path in ("conv.weight", "more.weight", "fc.weight"):
        assert signs_by_column(bio)[path] == list(given)
    # units that are one can be given their signs where any of them is made
    other = constrained(model, overrides=(override("more", signs=given),))
    assert signs_by_column(other) == signs_by_column(bio)


def test_given_fractions_are_those_of_the_layer() -> None:
    bio = constrained(
        mlp()[0], overrides=(override("2", excitatory_fraction=1.0), override("0", excitatory_fraction=0))
    )
    assert signs_by_column(bio)["2.weight"] == [-1] * 8
    assert signs_by_column(bio)["5.weight"] == [1] * 7
    assert sorted(signs_by_column(bio)["7.weight"]) == [-1] * 3 + [1] * 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            (override("stem", signs=(1, 1, 1, 1)), override("conv", signs=(1, 1, 1, -1))),
            "'conv.weight' contradict",
        ),
        ((override("stem", signs=(1, 1)),), "one for each of the 4 outputs of 'stem.weight', found 2"),
        (
            (override("conv", excitatory_fraction=0.75),),
            "excitatory_fraction, in a config dales_excitatory_fraction: 'conv.weight' is given 0.75 and",
        ),
    ],
)
def test_contradictions_are_refused(overrides: tuple[Override, ...], words: str) -> None:
    with pytest.raises(biofx.OptionError, match=words):
        constrained(residual()[0], overrides=overrides)


def test_split_channels_are_one_unit_with_one_sign() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    passes = [SplitWeights(gamma=2), ConstrainSigns(constrain_readout=True)]
    bio, _ = biofx.transform(model, passes=passes)
    for path in ("2.weight", "4.weight"):
        signs = signs_by_column(bio)[path]
        assert signs[0::2] == signs[1::2]
        assert sorted(set(signs)) == [-1, 1]


def test_queries_and_keys_are_exempt_and_values_are_not() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        batch, steps, _ = x.shape
        x = F.relu(m.embed(x))
        query, key, value = m.joint(x).reshape(batch, steps, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, F.relu(value))
        return m.out(mixed.transpose(1, 2).reshape(batch, steps, 6))  # type: ignore[no-any-return]

    model = Net(forward, embed=nn.Linear(5, 6), joint=nn.Linear(6, 18), out=nn.Linear(6, 6))
    bio = constrained(model, initialisation="keep")
    laid_out = bio_module_at(bio, "joint.weight").signs()
    laid_out = laid_out.expand(18, 6)
    assert not laid_out[:12].any()
    assert bool((laid_out[12:].abs() == 1).all())
    kept = bio.get_buffer("joint.bio_mod.sign")
    assert not kept[:12].any()
    assert signs_by_column(bio)["out.weight"] == kept[12:].tolist()
    assert int((kept[12:] == 1).sum()) == 3


def test_inputs_that_one_weight_reads_as_free_are_not_constrained_at_another() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        both = torch.cat([x, torch.relu(m.a(x))], 1)
        out: Tensor = m.d(torch.relu(m.b(both)) + torch.relu(m.c(both)))
        return out

    parts = {"a": _conv(2, 3), "b": _conv(5, 4), "c": _conv(5, 4), "d": _conv(4, 2)}
    free, _ = biofx.transform(Net(forward, **parts), passes=ConstrainSigns(only="b"))
    assert free.get_buffer("a.bio_mod.local_sign").tolist() == [0, 0]
    with pytest.raises(biofx.OptionError, match=r"left free where 'a\.weight' reads them"):
        biofx.transform(free, passes=ConstrainSigns(only="c", constrain_inputs=True))
    held, _ = biofx.transform(Net(forward, **parts), passes=ConstrainSigns(constrain_inputs=True))
    for path in ("b", "c"):
        state = held.get_submodule(f"{path}.bio_mod")
        assert isinstance(state, biofx.BioModule)
        assert (state.presynaptic_signs() != 0).all()
