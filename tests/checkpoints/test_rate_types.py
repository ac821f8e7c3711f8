from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx
from biofx import BioConfig, BioConverter, BioGraphModule
from biofx.config import RATE_DTYPES, STORED_RATE_DTYPES
from biofx.errors import CheckpointError, OptionError
from biofx.plasticity.bio_module import BioModule

CONFIG = BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True).override(
    "2", fuzzy_learning_rate_factor_nu=0.3
)
ROUNDS = {(one, other) for one in RATE_DTYPES for other in RATE_DTYPES if one != other} - {
    *((one, "float32") for one in RATE_DTYPES),
    ("float32", "seed"),
}
"""Conversions after which factors are not the saved ones."""


def made(mlp: nn.Module, dtype: str, **fields: Any) -> BioGraphModule:
    return biofx.transform(mlp, CONFIG.replace(fuzzy_lr_dtype=dtype, **fields)).graph_module


def state(model: nn.Module, layer: str) -> BioModule:
    found = model.get_submodule(f"{layer}.bio_mod")
    assert isinstance(found, BioModule)
    return found


def rates(model: nn.Module, layer: str = "2") -> Tensor:
    found = state(model, layer).fuzzy_learning_rate_parameters
    assert found is not None
    return found.float()


def form(model: nn.Module, layer: str = "2") -> str:
    held = state(model, layer)
    if held.is_drawn:
        return "seed"
    assert held.stored_factors is not None
    return str(held.stored_factors.dtype).removeprefix("torch.")


def expected(factors: Tensor, drawn: Tensor, dtype: str) -> Tensor:
    """The factors as a type has them, by definition."""
    return {"float32": factors, "bfloat16": factors.bfloat16().float(), "seed": drawn}[dtype]


@pytest.mark.parametrize("way", ["transformed", "plain"])
@pytest.mark.parametrize("then", RATE_DTYPES)
@pytest.mark.parametrize("first", RATE_DTYPES)
def test_every_type_loads_into_every_other(
    first: str, then: str, way: str, mlp: nn.Module, vectors: Tensor, tmp_path: Path
) -> None:
    saved, drawn = made(mlp, first), rates(made(mlp, "float32"))
    with torch.no_grad():
        saved.get_parameter("2.weight").add_(1)
    biofx.save(saved, tmp_path / "run.pt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == "plain":
            loaded = biofx.load(tmp_path / "run.pt", mlp, fuzzy_lr_dtype=then)
        else:
            target = made(mlp, then)
            loaded = biofx.load(tmp_path / "run.pt", target)
            assert loaded is target
    assert form(loaded) == then
    assert state(loaded, "2").config.fuzzy_lr_dtype == then
    assert torch.equal(rates(loaded), expected(rates(saved), drawn, then))
    assert torch.equal(loaded.get_parameter("2.weight"), saved.get_parameter("2.weight"))
    assert biofx.check(loaded).ok
    differs = not torch.equal(rates(loaded), rates(saved))
    assert differs == ((first, then) in ROUNDS and first != then)
    assert [str(entry.message)[:51] for entry in caught] == (
        ["the learning-rate factors of 3 weights differ from "] if differs else []
    )
    # what was converted is a model of its own right: its gradients, its next checkpoint
    plain = made(mlp, then, fuzzy_lr_distribution="baseline")
    plain.load_state_dict(biofx.checkpoints.plain_state(saved), strict=False)
    for model in (loaded, plain):
        model(vectors).square().sum().backward()
    gradient, unscaled = (model.get_parameter("2.weight").grad for model in (loaded, plain))
    assert torch.equal(gradient, unscaled * rates(loaded))  # type: ignore[operator, arg-type]
    biofx.save(loaded, tmp_path / "again.pt")
    assert torch.equal(rates(biofx.load(tmp_path / "again.pt", mlp)), rates(loaded))


@pytest.mark.parametrize("then", ["bfloat16", "seed"])
def test_converted_models_are_converted_again(then: str, mlp: nn.Module, tmp_path: Path) -> None:
    converter = BioConverter(fuzzy_learning_rate_factor_nu=0.3)
    saved = converter(mlp)
    biofx.save(saved, tmp_path / "run.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = biofx.load(tmp_path / "run.pt", mlp, fuzzy_lr_dtype=then)
    assert form(loaded) == then
    assert torch.equal(rates(loaded), expected(rates(saved), rates(saved), then))


@pytest.mark.parametrize("then", RATE_DTYPES)
def test_rates_that_training_has_changed(then: str, mlp: nn.Module, tmp_path: Path) -> None:
    saved = made(mlp, "float32")
    state(saved, "2").fuzzy_learning_rate_parameters.mul_(0.5)  # type: ignore[union-attr]
    biofx.save(saved, tmp_path / "run.pt")
    target = made(mlp, then)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    if then == "seed":
        with pytest.raises(
            CheckpointError, match=r"'2.weight': expected the factors that uniform with nu=0.3"
        ):
            biofx.load(tmp_path / "run.pt", target)
        assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        biofx.load(tmp_path / "run.pt", target)
    assert torch.equal(rates(target), expected(rates(saved), rates(saved), then))


def test_other_options_still_have_to_agree(mlp: nn.Module, tmp_path: Path) -> None:
    biofx.save(made(mlp, "bfloat16"), tmp_path / "run.pt")
    for fields in ({"seed": 1}, {"fuzzy_lr_max": 1.5}, {"weight_splitting_Gamma": 0}):
        with pytest.raises(CheckpointError, match="Transform it with the same options"):
            biofx.load(tmp_path / "run.pt", made(mlp, "seed", **fields))
    with pytest.raises(CheckpointError, match="expected a plain model with fuzzy_lr_dtype"):
        biofx.load(tmp_path / "run.pt", made(mlp, "seed"), fuzzy_lr_dtype="seed")
    with pytest.raises(OptionError, match="fuzzy_lr_dtype: expected one of float32, bfloat16, seed"):
        biofx.load(tmp_path / "run.pt", mlp, fuzzy_lr_dtype="int8")


def test_rates_that_go_on_changing_stay_float32(mlp: nn.Module, tmp_path: Path) -> None:
    saved = made(mlp, "float32", fuzzy_lr_distribution="temporal", fuzzy_lr_dynamic=True)
    biofx.save(saved, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="expected 'float32' for factors that go on changing"):
        biofx.load(tmp_path / "run.pt", mlp, fuzzy_lr_dtype="bfloat16")


@pytest.mark.parametrize("first", STORED_RATE_DTYPES)
def test_state_dicts_pass_to_and_from_the_seed(first: str, mlp: nn.Module) -> None:
    stored, drawn = made(mlp, first), made(mlp, "seed")
    drawn.load_state_dict(stored.state_dict())
    assert torch.equal(rates(drawn), rates(made(mlp, "float32")))
    other = made(mlp, first, seed=9)
    other.load_state_dict(drawn.state_dict())
    assert torch.equal(rates(other), rates(stored))
    for dtype in (first, "seed"):
        with pytest.raises(
            RuntimeError, match=r"'2.weight': expected the factors that .* draws, found others"
        ):
            drawn.load_state_dict(made(mlp, dtype, seed=9).state_dict())


def test_a_checkpoint_without_rates_is_refused(mlp: nn.Module) -> None:
    saved, target = made(mlp, "float32").state_dict(), made(mlp, "seed")
    del saved["0.bio_mod.fuzzy_learning_rate_parameters"]
    with pytest.raises(RuntimeError, match=r"0.bio_mod.fuzzy_learning_rate_draw"):
        target.load_state_dict(saved)
