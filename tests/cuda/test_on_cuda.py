"""What holds on a GPU: nothing waits, graphs can be captured, draws are those of the CPU, ranks agree.

These tests run where there is a CUDA device (``pytest -m cuda``) and are skipped elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import biofx
from biofx import BioConfig, Distribution, Rule

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
EVERYTHING: Mapping[str, Any] = {
    "weight_splitting_Gamma": 2,
    "apply_dales_principle": True,
    "weight_density": 0.5,
    "fuzzy_lr_distribution": Distribution.LOGNORMAL,
}
RULES: dict[str, tuple[Mapping[str, Any], list[str]]] = {
    "mechanisms": (EVERYTHING, []),
    "volume, scaling": (EVERYTHING, ["volume_dependent_lr", "synaptic_scaling"]),
    "upgd": ({"consolidation": "upgd", "upgd_noise": 0.01}, ["upgd"]),
    "l2_to_initial": ({"l2_to_initial_strength": 0.1}, ["l2_to_initial"]),
    "following weights": (
        {**EVERYTHING, "fuzzy_lr_distribution": Distribution.WEIGHT_ADAPTIVE, "fuzzy_lr_dynamic": True},
        [],
    ),
    "from seed": ({"fuzzy_lr_dtype": "seed"}, []),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(8 * 36, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5)),
    )


def batch(number: int = 0, device: str = "cuda") -> Tensor:
    return torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(number)).to(device)


def rewritten(config: Mapping[str, Any], device: str = "cuda") -> nn.Module:
    return biofx.transform(net(), BioConfig(**config)).graph_module.to(device)


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def step(bio: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    bio(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("case", RULES)
def test_a_step_with_everything_on_waits_for_nothing(case: str) -> None:
    config, rules = RULES[case]
    bio = rewritten(config)
    optimizer = torch.optim.SGD(bio.parameters(), lr=0.01, momentum=0.9)
    biofx.attach(bio, optimizer, [Rule(name) for name in rules])
    step(bio, optimizer, batch(0))
    before = copy.deepcopy(bio.state_dict())
    x = batch(1)
    torch.cuda.synchronize()
    with waiting_is_an_error():
        step(bio, optimizer, x)
    assert any(not torch.equal(value, before[name]) for name, value in bio.state_dict().items())


@pytest.mark.parametrize("case", RULES)
def test_a_run_on_the_device_is_that_on_the_cpu(case: str) -> None:
    config, rules = RULES[case]
    ends: list[dict[str, Tensor]] = []
    for device in ("cpu", "cuda"):
        bio = rewritten(config, device)
        optimizer = torch.optim.SGD(bio.parameters(), lr=0.01)
        biofx.attach(bio, optimizer, [Rule(name) for name in rules])
        for number in range(3):
            step(bio, optimizer, batch(number, device))
        ends.append({name: value.cpu() for name, value in bio.state_dict().items()})
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("distribution", list(Distribution))
def test_factors_are_those_of_the_cpu_to_the_bit(distribution: Distribution) -> None:
    config: dict[str, Any] = {"fuzzy_lr_distribution": distribution}
    moved = rewritten(config).state_dict()
    made_there, _ = biofx.transform(net().to("cuda"), BioConfig(**config))
    expected = rewritten(config, "cpu").state_dict()
    sampled = [name for name in expected if "bio_mod" in name and expected[name].is_floating_point()]
    assert (distribution is Distribution.BASELINE) or sampled
    for name in sampled:
        if distribution is Distribution.WEIGHT_ADAPTIVE:  # whose means of weights a device rounds its own way
            torch.testing.assert_close(made_there.state_dict()[name].cpu(), expected[name])
        else:
            assert torch.equal(made_there.state_dict()[name].cpu(), expected[name]), name
        assert torch.equal(moved[name].cpu(), expected[name]), name


def test_a_captured_step_replays_what_eager_steps_do() -> None:
    eager = rewritten(EVERYTHING)
    captured = copy.deepcopy(eager)
    x = batch(0)
    bio_optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (eager, captured)]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(captured, bio_optimizers[1], x)
    torch.cuda.current_stream().wait_stream(aside)
    for _ in range(3):
        step(eager, bio_optimizers[0], x)
    graph = torch.cuda.CUDAGraph()
    bio_optimizers[1].zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        captured(x).square().mean().backward()
        bio_optimizers[1].step()
    for number in range(3):
        x.copy_(batch(number))
        graph.replay()
        step(eager, bio_optimizers[0], batch(number))
    torch.testing.assert_close(captured.state_dict(), eager.state_dict())


def test_a_compiled_step_with_less_overhead_is_that_of_eager_steps() -> None:
    torch._dynamo.reset()
    eager = rewritten(EVERYTHING)
    compiled: Any = torch.compile(copy.deepcopy(eager), mode="reduce-overhead")
    for number in range(3):
        compiled(batch(number)).square().mean().backward()
        eager(batch(number)).square().mean().backward()
    found = {name.removeprefix("_orig_mod."): p.grad for name, p in compiled.named_parameters()}
    expected = {name: p.grad for name, p in eager.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()


def test_autocast_in_bfloat16_comes_near_float32() -> None:
    exact, rounded = rewritten(EVERYTHING), rewritten(EVERYTHING)
    exact(batch()).square().mean().backward()
    with torch.autocast("cuda", torch.bfloat16):
        loss = rounded(batch()).float().square().mean()
    loss.backward()
    for (name, found), (_, expected) in zip(
        rounded.named_parameters(), exact.named_parameters(), strict=True
    ):
        assert found.grad is not None, name
        assert expected.grad is not None, name
        distance = (found.grad - expected.grad).norm()
        assert distance <= 0.05 * expected.grad.norm() + 1e-3, name


@contextmanager
def one_process_group() -> Iterator[None]:
    store = HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_a_step_over_nccl_is_that_of_one_process(wrapper: str) -> None:
    alone = rewritten(EVERYTHING)
    shared = copy.deepcopy(alone)
    with one_process_group():
        model: Any = DistributedDataParallel(shared) if wrapper == "DDP" else fully_shard(shared)
        for bio in (alone, model):
            optimizer = torch.optim.SGD(bio.parameters(), lr=0.01)
            biofx.attach(bio, optimizer, [])
            for number in range(2):
                step(bio, optimizer, batch(number))
        for path, expected in alone.named_parameters():
            found: Any = shared.get_parameter(path)
            whole = found.full_tensor() if hasattr(found, "full_tensor") else found
            torch.testing.assert_close(whole.detach(), expected.detach())
