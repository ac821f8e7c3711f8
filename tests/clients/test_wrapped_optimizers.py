"""Optimizers as trainers and other optimizers wrap them: looked through, or refused with a remedy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import biofx
from biofx.errors import PlasticityError
from tests.plasticity.runs import assert_scaled, batches, factors_of, fresh, train


def test_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    bio = fresh()
    model, optimizer = accelerator.prepare(bio, torch.optim.Adam(bio.parameters()))
    plasticity = biofx.attach(model, optimizer)
    assert_scaled(bio, optimizer)
    assert plasticity.steps == 1
    twin = fresh()
    plain = torch.optim.Adam(twin.parameters())
    before = biofx.attach(twin, plain)
    _, prepared = accelerator.prepare(twin, plain)
    assert_scaled(twin, prepared)
    assert before.steps == 1


@pytest.mark.filterwarnings("ignore")
def test_lightning() -> None:
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.bio = fresh()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=0.01)

        def on_train_start(self) -> None:
            self.plasticity = biofx.attach(self.bio, self.optimizers())

        def training_step(self, batch: Any, index: int) -> Any:
            return (self.bio(batch) - batch[:, :1]).square().mean()

    task = Task()
    start = task.bio.get_parameter("0.weight").detach().clone()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **quiet)
    data: Any = torch.utils.data.DataLoader(list(next(batches(1))), batch_size=16)  # type: ignore[arg-type]
    trainer.fit(task, data)
    moved = (task.bio.get_parameter("0.weight").detach() - start).abs()
    assert task.plasticity.steps == 1
    torch.testing.assert_close(moved, 0.01 * factors_of(task.bio), rtol=1e-3, atol=0)  # Adam's first step


@pytest.mark.parametrize("pullback", ["none", "reset", "pullback"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_lookahead_moves_weights_in_proportion(name: str, pullback: str) -> None:
    package = pytest.importorskip("pytorch_optimizer")
    moved = []
    for rate in (0.25, 1.0):
        bio = biofx.BioConverter()(torch.nn.Sequential(torch.nn.Linear(6, 8, bias=False)))
        torch.manual_seed(0)
        weight = bio.get_parameter("0.weight")
        factors_of(bio).fill_(rate)
        options = {"momentum": 0.9} if name == "SGD" else {"weight_decay": 0.0}
        inner = getattr(torch.optim, name)(bio.parameters(), lr=0.01, **options)
        optimizer = package.Lookahead(inner, k=5, pullback_momentum=pullback)
        biofx.attach(bio, optimizer)
        start = weight.detach().clone()
        generator = torch.Generator().manual_seed(1)
        for _ in range(12):
            weight.grad = torch.randn(8, 6, generator=generator) + 0.5
            optimizer.step()
        moved.append(weight.detach() - start)
    torch.testing.assert_close(moved[0], 0.25 * moved[1], rtol=1e-3, atol=1e-6)


def test_sam_is_refused_and_its_inner_optimizer_is_not() -> None:
    package = pytest.importorskip("pytorch_optimizer")
    bio = fresh()
    optimizer = package.SAM(bio.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(
        PlasticityError, match=r"SAM cannot be tried .* attach to optimizer.base_optimizer, the SGD"
    ):
        biofx.attach(bio, optimizer)
    plasticity = biofx.attach(bio, optimizer.base_optimizer)
    factors_of(bio).zero_()
    weight = bio.get_parameter("0.weight")
    before = weight.detach().clone()

    def closure() -> Any:
        optimizer.zero_grad()
        loss = bio(next(batches(1))).square().mean()
        loss.backward()
        return loss

    closure()
    optimizer.step(closure)
    assert plasticity.steps == 1
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_weights_of_schedule_free_optimizers_are_in_proportion_where_they_are_evaluated(
    name: str, weight_decay: float
) -> None:
    package = pytest.importorskip("schedulefree")
    bio = fresh(fuzzy_lr_min=0.0)
    with torch.no_grad():
        bio.get_parameter("0.weight").zero_()
    rates = torch.tensor([0.0, 0.1, 0.25, 0.5, 1.0, 1.0, 1.0, 1.0])
    factors_of(bio).copy_(rates[:, None].expand(8, 6))
    weight = bio.get_parameter("0.weight")
    optimizer = getattr(package, name)(bio.parameters(), lr=0.001, weight_decay=weight_decay)
    biofx.attach(bio, optimizer)
    optimizer.train()
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        weight.grad = (torch.randn(6, generator=generator) + 1).expand(8, 6) * factors_of(bio)
        optimizer.step()
    optimizer.eval()
    assert not weight[0].count_nonzero()
    torch.testing.assert_close(weight.detach(), rates[:, None] * weight[-1].detach(), rtol=0.02, atol=1e-6)


def test_copied_schedule_free_run_goes_on_as_the_original_does() -> None:
    package = pytest.importorskip("schedulefree")
    bio = fresh()
    optimizer = package.AdamWScheduleFree(bio.parameters(), lr=0.01)
    plasticity = biofx.attach(bio, optimizer)
    optimizer.train()
    train(bio, optimizer, 3)
    twin, other, _ = copy.deepcopy((bio, optimizer, plasticity))
    for model, stepped in ((bio, optimizer), (twin, other)):
        train(model, stepped, 3, seed=2)
        stepped.eval()
    assert torch.equal(bio.get_parameter("0.weight"), twin.get_parameter("0.weight"))
