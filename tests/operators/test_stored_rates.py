from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import biofx
from biofx.config import RATE_DTYPES, STORED_RATE_DTYPES
from biofx.errors import OptionError
from biofx.operators.rate_ops import multiply_by_blocks
from biofx.operators.rate_sampling import CHANGING
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.saved_state import stored_as

HALVES = {"fuzzy_lr_dtype": "bfloat16"}


def state(model: nn.Module, layer: str = "0") -> BioModule:
    found = model.get_submodule(f"{layer}.bio_mod")
    assert isinstance(found, BioModule)
    return found


def rates(model: nn.Module, layer: str = "0") -> Tensor:
    found = state(model, layer).fuzzy_learning_rate_parameters
    assert found is not None
    return found.float()


def gradient(model: nn.Module, name: str = "0.weight") -> Tensor:
    found = model.get_parameter(name).grad
    assert found is not None
    return found


def step(model: nn.Module, x: Tensor) -> None:
    model.zero_grad()
    model(x).square().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(700, 900), (700, 1), (1, 900), (1, 1)])
def test_blocks_multiply_as_the_whole_does(shape: tuple[int, int], dtype: torch.dtype) -> None:
    factors, values = (1 + 0.3 * torch.rand(shape)).bfloat16(), torch.randn(700, 900).to(dtype)
    expected, out = values * factors.to(dtype), torch.empty_like(values)
    assert torch.equal(multiply_by_blocks(values, factors, out=out), expected)
    assert multiply_by_blocks(values, factors, out=values) is values
    assert torch.equal(values, expected)


@pytest.mark.parametrize(("low", "high"), [(0.7, 1.3), (0.999, 1.001), (1, 1), (0, 2)])
def test_bfloat16_stays_within_the_bounds(low: float, high: float) -> None:
    found = stored_as("bfloat16", torch.linspace(low, high, 999), low, high).double()
    assert low <= found.min() <= found.max() <= high
    if high - low > 0.5:
        assert (found - torch.linspace(low, high, 999)).abs().max() <= 2**-7


@pytest.mark.parametrize("large", [False, True])
def test_gradients_are_the_plain_ones_times_the_rates_to_the_bit(large: bool) -> None:
    plain = nn.Sequential(nn.Linear(700, 800 if large else 6), nn.ReLU(), nn.Linear(800 if large else 6, 3))
    bio = biofx.transform(plain, HALVES).graph_module
    x = torch.randn(5, 700)
    step(plain, x)
    step(bio, x)
    for layer in ("0", "2"):
        name = f"{layer}.weight"
        assert torch.equal(gradient(bio, name), gradient(plain, name) * rates(bio, layer))
    assert rates(bio).std() > 0.05
    assert biofx.check(bio).ok


def test_gradients_of_gradients_are_those_of_the_same_rates_as_numbers(mlp: nn.Module) -> None:
    halves, numbers = biofx.transform(mlp, HALVES).graph_module, biofx.transform(mlp).graph_module
    numbers.load_state_dict(halves.state_dict())
    x, found = torch.randn(5, 4), []
    for bio in (halves, numbers):
        weight = bio.get_parameter("0.weight")
        (first,) = torch.autograd.grad(bio(x).pow(3).sum(), weight, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), weight)[0])
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(*found)


def test_rates_that_are_assigned_act(mlp: nn.Module, vectors: Tensor) -> None:
    bio = biofx.transform(mlp, HALVES).graph_module
    wanted = torch.where(torch.arange(24).reshape(6, 4) % 2 == 0, 0.0, 1.5)
    state(bio).fuzzy_learning_rate_parameters = wanted
    assert torch.equal(rates(bio), wanted)
    step(mlp, vectors)
    step(bio, vectors)
    assert torch.equal(gradient(bio), gradient(mlp) * wanted)


@pytest.mark.parametrize("dtype", RATE_DTYPES)
@pytest.mark.parametrize("granularity", ["element", "neuron", "layer"])
def test_the_converter_applies_them_when_called(
    dtype: str, granularity: str, mlp: nn.Module, vectors: Tensor
) -> None:
    bio = biofx.BioConverter(fuzzy_lr_dtype=dtype, fuzzy_lr_granularity=granularity)(mlp)
    step(mlp, vectors)
    step(bio, vectors)
    assert bio.fuzzy_learning_rates()["0.weight"] == 24
    assert torch.equal(gradient(bio), gradient(mlp) * rates(bio))
    assert rates(bio).numel() == {"element": 24, "neuron": 6, "layer": 1}[granularity]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_attached_steps_equal_those_with_the_same_rates_as_numbers(
    optimizer: type[torch.optim.Optimizer], mlp: nn.Module, vectors: Tensor
) -> None:
    halves, plain = biofx.BioConverter(HALVES)(mlp), biofx.BioConverter()(mlp)
    plain.load_state_dict(halves.state_dict())
    for bio in (halves, plain):
        options: dict[str, Any] = {"lr": 0.1}
        stepping = optimizer(bio.parameters(), **options)
        biofx.attach(bio, stepping, observers=[biofx.Monitor()])
        for _ in range(3):
            step(bio, vectors)
            stepping.step()
    assert torch.equal(halves.get_parameter("0.weight"), plain.get_parameter("0.weight"))


@pytest.mark.parametrize("first", STORED_RATE_DTYPES)
@pytest.mark.parametrize("then", STORED_RATE_DTYPES)
@pytest.mark.parametrize("distribution", ["uniform", "weight_adaptive"])
def test_checkpoints_pass_between_types(first: str, then: str, distribution: str, mlp: nn.Module) -> None:
    config = biofx.BioConfig(fuzzy_lr_distribution=distribution)  # type: ignore[arg-type]
    saved = biofx.transform(mlp, config.replace(fuzzy_lr_dtype=first, seed=1)).graph_module
    model = biofx.transform(mlp, config.replace(fuzzy_lr_dtype=then, seed=2)).graph_module
    if distribution == "weight_adaptive" and then == "float32" and first != "float32":
        with pytest.raises(RuntimeError, match="noise"):  # which only float32 keeps, to go on changing
            model.load_state_dict(saved.state_dict())
        return
    given = saved.state_dict()
    keys = set(given)
    model.load_state_dict(given)
    assert set(given) == keys
    expected = rates(saved)
    if then == "bfloat16":
        expected = expected.bfloat16().float()
    assert torch.equal(rates(model), expected)
    assert not torch.equal(rates(model), rates(biofx.transform(mlp, config.replace(seed=2)).graph_module))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda bio: pickle.loads(pickle.dumps(bio))])
def test_copies_are_independent(copied: Any, mlp: nn.Module) -> None:
    bio = biofx.transform(mlp, HALVES).graph_module
    before, twin = rates(bio), copied(bio)
    assert torch.equal(rates(twin), before)
    state(twin).fuzzy_learning_rate_parameters = torch.ones(6, 4)
    assert torch.equal(rates(bio), before)


@pytest.mark.parametrize("distribution", CHANGING)
def test_factors_that_go_on_changing_need_float32(distribution: biofx.Distribution) -> None:
    with pytest.raises(OptionError, match="fuzzy_lr_dtype: expected 'float32'"):
        biofx.BioConfig(fuzzy_lr_dtype="bfloat16", fuzzy_lr_distribution=distribution, fuzzy_lr_dynamic=True)
    assert biofx.BioConfig(fuzzy_lr_dtype="bfloat16", fuzzy_lr_distribution=distribution)


def test_crystallization_in_bfloat16_multiplies_the_rates(mlp: nn.Module, vectors: Tensor) -> None:
    bio = biofx.BioConverter(fuzzy_lr_dtype="bfloat16", crystal_thresh=1e9)(mlp)
    before = rates(bio)
    step(bio, vectors)
    bio.crystallize()
    caught = gradient(bio) != 0
    assert caught.any()
    assert torch.equal(rates(bio)[caught], (before * 0.6).bfloat16()[caught].to(before))


def test_the_report_says_how_fine_they_are(mlp: nn.Module) -> None:
    report = biofx.transform(mlp, HALVES).report
    assert report.passes[0].remarks[0].message.startswith("24 factors in bfloat16, uniform")


class LiveBytes(TorchDispatchMode):
    """Watches how many bytes of memory the tensors hold that are made meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {entry.untyped_storage()._cdata for entry in tree_leaves(args) if isinstance(entry, Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.device.type == "cpu":
                storage = made.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self._live += storage.nbytes()
                    self.most = max(self.most, self._live)
                    weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())
        return result

    def _drop(self, place: int, size: int) -> None:
        self._known.discard(place)
        self._live -= size


@pytest.mark.parametrize("shared", [True, False])
def test_sharing_parameters_makes_no_second_copy(shared: bool) -> None:
    layers = [layer for _ in range(12) for layer in (nn.Linear(400, 400, bias=False), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(400, 4))
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    config = biofx.BioConfig(weight_splitting_Gamma=2, fuzzy_lr_dtype="bfloat16")
    with LiveBytes() as watched:
        bio = biofx.transform(model, config, share_parameters=shared).graph_module
    same = [bio.get_parameter(name) is own for name, own in model.named_parameters()]
    if shared:
        # a byte per rate stays; while a layer draws, some numbers of its own, a twelfth of all
        assert all(same)
        assert watched.most <= 0.7 * weights
    else:
        assert not any(same)
        assert watched.most >= weights
