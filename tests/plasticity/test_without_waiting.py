"""A training step asks nothing of the tensors on a device, but by rules at the steps at which they run.

A read of a value (``aten._local_scalar_dense``, which ``item``, ``float``, ``bool`` and ``int`` come to), a
shape that depends on values (``nonzero``, picking by a mask) and a comparison of whole tensors make the host
wait until the device has done all that it was told to do, and cannot be captured in a CUDA graph. Here the
CPU is taken for such a device: nothing counts as being on the host. On the ``meta`` device, which has no
values at all, a step runs too, and shows every copy between host and device.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import biofx
from biofx import BioConfig, Distribution, Rule
from biofx.operators import dispatch
from biofx.plasticity import binding
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.bio_state import BioState
from biofx.plasticity.updates import Way
from biofx.torch_private import pytree

WAITING = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero"),
    *("aten::_unique2", "aten::bincount", "aten::repeat_interleave.Tensor", "aten::allclose"),
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class WaitError(AssertionError):
    pass


class NothingWaits(TorchDispatchMode):
    """Raises where the library, not torch's own optimizer, would wait for a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, self.calls = func._schema.name, self.calls + 1
        picks = name in INDEXING and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITING or picks:
            frames = traceback.extract_stack()[:-1]
            ours = [f"{frame.filename}:{frame.lineno} {frame.line}" for frame in frames if is_ours(frame)]
            if ours and not samples_on_the_cpu(frames):
                raise WaitError(f"{name} at {ours[-1]}")
        return func(*args, **(kwargs or {}))


def is_ours(frame: traceback.FrameSummary) -> bool:
    return "/biofx/" in frame.filename or "/passes/" in frame.filename


def samples_on_the_cpu(frames: list[traceback.FrameSummary]) -> bool:
    """Whether numbers are read that are on the CPU wherever the weight is, since they are sampled there."""
    return any(frame.filename.endswith("rate_sampling.py") and frame.name == "fill" for frame in frames)


@pytest.fixture(autouse=True)
def the_cpu_is_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_HOSTS", set())
    return iter(())


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(8 * 16, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU()),
        nn.Linear(8, 5),
    )


def run(
    config: BioConfig,
    rules: list[Rule],
    optimizer: Callable[[Any], torch.optim.Optimizer],
    *,
    steps: int = 3,
    watched: Callable[[int], bool] = lambda step: step > 0,
    **options: Any,
) -> tuple[nn.Module, int]:
    """Train, and return how many operators the steps called in which nothing may wait, too.

    What is asked once is asked in the first step.
    """
    seen = NothingWaits()
    bio, _ = biofx.transform(net(), config)
    stepping = optimizer(bio.parameters())
    plasticity = biofx.attach(bio, stepping, rules, **options)
    if config.consolidation not in ("off", "upgd"):
        plasticity.begin_task()
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = torch.randn(4, 3, 6, 6, generator=generator)
        y = torch.randint(5, (4,), generator=generator)
        if watched(step):
            with seen:
                one_step(bio, stepping, x, y)
        else:
            one_step(bio, stepping, x, y)
    return bio, seen.calls


def one_step(bio: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(bio(x), y).backward()
    optimizer.step()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)


def plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.001)


EVERYTHING: Mapping[str, Any] = {
    "weight_splitting_Gamma": 2,
    "apply_dales_principle": True,
    "weight_density": 0.5,
    "fuzzy_lr_distribution": Distribution.LOGNORMAL,
}
CONFIGS: dict[str, Mapping[str, Any]] = {
    "split, signs, mask, rates": EVERYTHING,
    "projected signs": {**EVERYTHING, "dales_method": "project"},
    "sub-weights, signs": {
        "weight_splitting_Gamma": 2,
        "weight_splitting_mode": "sub-weights",
        "apply_dales_principle": True,
    },
    "stored in bfloat16": {**EVERYTHING, "fuzzy_lr_dtype": "bfloat16"},
    "sampled": {"fuzzy_lr_distribution": Distribution.UNIFORM, "fuzzy_lr_dtype": "seed"},
    "factors of 0": {"fuzzy_lr_distribution": Distribution.NORMAL, "fuzzy_lr_min": 0.0},
    "following weights": {
        **EVERYTHING,
        "fuzzy_lr_distribution": Distribution.WEIGHT_ADAPTIVE,
        "fuzzy_lr_dynamic": True,
    },
    "following activity": {
        **EVERYTHING,
        "fuzzy_lr_distribution": Distribution.ACTIVITY,
        "fuzzy_lr_dynamic": True,
    },
}


@pytest.mark.parametrize(
    ("config", "optimizer"), [*((name, sgd) for name in CONFIGS), ("split, signs, mask, rates", adamw)]
)
def test_a_step_of_every_mechanism_waits_for_nothing(
    config: str, optimizer: Callable[[Any], torch.optim.Optimizer]
) -> None:
    _, calls = run(BioConfig(**CONFIGS[config]), [], optimizer)
    assert calls > 100


@pytest.mark.parametrize("config", ["split, signs, mask, rates", "following weights", "following activity"])
def test_what_is_computed_without_waiting_is_what_is_computed_on_the_host(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = run(BioConfig(**CONFIGS[config]), [Rule("volume_dependent_lr")], sgd)
    monkeypatch.setattr(dispatch, "_HOSTS", {"cpu"})
    expected, calls = run(BioConfig(**CONFIGS[config]), [Rule("volume_dependent_lr")], sgd, watched=never)
    torch.testing.assert_close(found.state_dict(), expected.state_dict())
    assert calls == 0


def never(step: int) -> bool:
    return False


def test_updates_in_proportion_to_weights_wait_for_nothing() -> None:
    _, calls = run(BioConfig(apply_dales_principle=True), [], plain_sgd, updates="exponentiated")
    assert calls > 100


def test_factors_of_0_are_asked_for_once_and_again_when_they_were_written_to() -> None:
    bio, _ = biofx.transform(net(), BioConfig())
    optimizer = sgd(bio.parameters())
    biofx.attach(bio, optimizer, [])
    state: Any = bio.get_submodule("9.bio_mod")
    held = state.fuzzy_learning_rate_parameters
    x, y = torch.randn(4, 3, 6, 6), torch.randint(5, (4,))
    one_step(bio, optimizer, x, y)
    before = bio.get_parameter("9.weight").detach().clone()
    with torch.no_grad():
        held[0] = 0
    one_step(bio, optimizer, x, y)
    with NothingWaits():
        one_step(bio, optimizer, x, y)
    after = bio.get_parameter("9.weight").detach()
    assert torch.equal(after[0], before[0])  # neither momentum nor decay moves them
    assert not torch.equal(after[1:], before[1:])


WAITS_FOR_NOTHING: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "volume_dependent_lr": (EVERYTHING, {}),
    "synaptic_scaling": (EVERYTHING, {}),
    "update_fuzzy_learning_rates": (CONFIGS["following weights"], {}),
    "synaptic_intelligence": ({"consolidation": "synaptic-intelligence"}, {}),
    "elastic_consolidation": ({"consolidation": "elastic"}, {}),
    "memory_aware": ({"consolidation": "memory-aware"}, {}),
    "upgd": ({"consolidation": "upgd", "upgd_noise": 0.01}, {}),
    "l2_to_initial": ({"l2_to_initial_strength": 0.1}, {}),
    "rejuvenate_units": ({"unit_turnover": "continual-backprop"}, {}),
}
"""Rules that may run at every step."""
AT_SCHEDULE: dict[str, tuple[str, Mapping[str, Any]]] = {
    "crystallize": ("it takes the mean of a whole weight, and says how many synapses it has caught", {}),
    "rejuvenate_weights": ("which weights go, and so how many, depends on their values", {}),
    "shrink_and_perturb": ("it says how many weights it has moved", {}),
}
"""Rules that wait at the steps at which they run, and why."""


@pytest.mark.parametrize("rule", WAITS_FOR_NOTHING)
def test_rules_that_run_at_every_step_wait_for_nothing(rule: str) -> None:
    config, options = WAITS_FOR_NOTHING[rule]
    _, calls = run(BioConfig(**config), [Rule(rule, **options)], sgd)
    assert calls > 100


@pytest.mark.parametrize("rule", AT_SCHEDULE)
def test_other_rules_wait_at_the_steps_at_which_they_run_alone(rule: str) -> None:
    why, more = AT_SCHEDULE[rule]
    config = BioConfig(**{**EVERYTHING, **more})
    _, calls = run(
        config, [Rule(rule, every=2)], sgd, steps=6, watched=lambda step: step > 0 and step % 2 == 1
    )
    assert calls > 100
    with pytest.raises(WaitError):
        run(config, [Rule(rule)], sgd)
    assert why


def test_every_rule_is_in_one_of_the_two_lists() -> None:
    assert set(WAITS_FOR_NOTHING).isdisjoint(AT_SCHEDULE)
    told = {"fuzzy_learning_rates", "enforce_dales_principle"}  # in the graph, and behind each step
    assert {*WAITS_FOR_NOTHING, *AT_SCHEDULE, *told} == set(BioModule.exposed_functions)


# on the meta device


class SeesCopies(TorchDispatchMode):
    """Notes from where in the library tensors go from one device to another."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        is_copy = func._schema.name in ("aten::_to_copy", "aten::copy_")
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor)]
        if len({tensor.device.type for tensor in tensors if is_copy or tensor.dim()}) > 1:
            ours = [frame.name for frame in traceback.extract_stack() if is_ours(frame)]
            self.found.append(f"{func._schema.name} in {ours[-1]}")
        return made


OF_ONE_DEVICE: dict[str, tuple[Mapping[str, Any], list[str]]] = {
    **{name: (config, []) for name, config in CONFIGS.items() if config.get("fuzzy_lr_dtype") != "seed"},
    "synaptic_scaling": (EVERYTHING, ["synaptic_scaling"]),
    "l2_to_initial": ({"l2_to_initial_strength": 0.1}, ["l2_to_initial"]),
    "upgd without noise": ({"consolidation": "upgd", "upgd_noise": 0.0}, ["upgd"]),
}
SAMPLED_AT_EVERY_STEP: dict[str, tuple[Mapping[str, Any], list[str]]] = {
    "factors": ({"fuzzy_lr_dtype": "seed"}, []),
    "noise of volumes": (EVERYTHING, ["volume_dependent_lr"]),
    "noise of UPGD": ({"consolidation": "upgd", "upgd_noise": 0.01}, ["upgd"]),
}
"""What is sampled on the CPU at every step, so that it is the same on every device."""


def copies_of_a_step(
    config: Mapping[str, Any], rules: list[str], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    # what an optimizer makes of factors is found out on the device itself, once
    monkeypatch.setattr(binding, "find_way", lambda *args, **options: (Way.GRADIENT, frozenset()))
    monkeypatch.setattr(BioState, "has_zeros", lambda state, factors: False)
    bio, _ = biofx.transform(net(), BioConfig(**config))
    bio.to("meta")
    assert {tensor.device.type for tensor in (*bio.parameters(), *bio.buffers())} == {"meta"}
    optimizer = sgd(bio.parameters())
    biofx.attach(bio, optimizer, rules)
    x = torch.empty(4, 3, 6, 6, device="meta")
    seen = SeesCopies()
    for _ in range(2):
        optimizer.zero_grad()
        with seen:
            bio(x).square().mean().backward()
            optimizer.step()
    return seen.found


@pytest.mark.parametrize("case", OF_ONE_DEVICE)
def test_a_step_copies_nothing_between_host_and_device(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config, rules = OF_ONE_DEVICE[case]
    assert copies_of_a_step(config, rules, monkeypatch) == []


@pytest.mark.parametrize("case", SAMPLED_AT_EVERY_STEP)
def test_what_is_sampled_at_every_step_goes_to_the_device_in_one_place_that_does_not_wait(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, rules = SAMPLED_AT_EVERY_STEP[case]
    assert set(copies_of_a_step(config, rules, monkeypatch)) == {"aten::_to_copy in handed_over"}
