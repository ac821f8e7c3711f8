"""The plain thing with each client: it trains, by the factors that were asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import biofx

FACTORS = torch.tensor([0.25, 0.5, 0.75, 1.0])


def with_factors() -> Any:
    """One layer whose rows learn at a quarter, a half, three quarters of the rate, and whole."""
    torch.manual_seed(0)
    bio_model: Any = biofx.transform(
        nn.Sequential(nn.Linear(3, 4)), {"fuzzy_learning_rate_factor_nu": 0.5}
    ).graph_module
    bio_model[0].bio_mod.fuzzy_learning_rate_parameters.copy_(FACTORS[:, None].expand(4, 3))
    return bio_model


def assert_rows_moved_by_their_factors(before: Tensor, after: Tensor) -> None:
    """Each row moved as far as its factor says, compared with the last, which learns at the whole rate."""
    moved = (after - before).detach().abs().mean(1)
    assert moved[-1] > 0
    torch.testing.assert_close(moved / moved[-1], FACTORS)


def batches() -> Any:
    """Four of them, of ones."""
    inputs: Any = torch.ones(8, 3)
    return torch.utils.data.DataLoader(inputs, batch_size=2)


def loss_of(output: Tensor) -> Tensor:
    """A loss whose gradient is the same for every row."""
    return output.sum()


def test_a_loop_of_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    bio_model = with_factors()
    before = bio_model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(bio_model.parameters(), lr=0.01, weight_decay=0)
    plasticity = biofx.attach(bio_model, optimizer)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, prepared_optimizer, loader = accelerator.prepare(bio_model, optimizer, batches())
    for batch in loader:
        prepared_optimizer.zero_grad()
        accelerator.backward(loss_of(prepared(batch)))
        prepared_optimizer.step()
    assert plasticity.steps == 4
    assert_rows_moved_by_their_factors(before, accelerator.unwrap_model(prepared)[0].weight)


def test_a_fit_of_lightning() -> None:
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.bio_model = with_factors()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.AdamW(self.bio_model.parameters(), lr=0.01, weight_decay=0)
            self.plasticity = biofx.attach(self.bio_model, optimizer)
            return optimizer

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return loss_of(self.bio_model(batch))

    task = Task()
    before = task.bio_model[0].weight.detach().clone()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(task, batches())
    assert task.plasticity.steps == 4
    assert_rows_moved_by_their_factors(before, task.bio_model[0].weight)


def test_a_trainer_of_transformers(tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class WithLoss(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            output = self.inner(x)
            return {"loss": loss_of(output), "output": output}

    bio_model = with_factors()
    before = bio_model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(bio_model.parameters(), lr=0.01, weight_decay=0)
    plasticity = biofx.attach(bio_model, optimizer)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model=WithLoss(bio_model),
        args=arguments,
        train_dataset=[{"x": torch.ones(3)} for _ in range(8)],
        optimizers=(optimizer, None),
    )
    trainer.train()
    assert plasticity.steps == 4
    assert_rows_moved_by_their_factors(before, bio_model[0].weight)


def test_a_layer_of_einops() -> None:
    layers = pytest.importorskip("einops.layers.torch")
    model = nn.Sequential(nn.Linear(4, 6), layers.Rearrange("b (h d) -> b h d", h=2), nn.Linear(3, 2))
    bio_model = biofx.transform(model, {"fuzzy_lr_distribution": "baseline"}).graph_module
    for samples in (5, 1):
        x = torch.randn(samples, 4)
        assert torch.equal(bio_model(x), model(x))


def test_an_adapter_of_peft_put_on_before_the_transform() -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"])).base_model.model
    nn.init.normal_(adapted[0].lora_B["default"].weight)
    bio_model = biofx.transform(adapted, {"fuzzy_lr_distribution": "baseline"}).graph_module
    x = torch.randn(5, 4)
    expected = adapted(x)
    assert not torch.allclose(expected, adapted[2](torch.relu(adapted[0].base_layer(x))))
    assert torch.equal(bio_model(x), expected)
    bio_model(x).square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in adapted.named_parameters():
        found: Any = bio_model.get_parameter(name)
        assert found.requires_grad == parameter.requires_grad, name
        assert (found.grad is None and parameter.grad is None) or torch.equal(found.grad, parameter.grad), (
            name
        )


def test_low_rank_layers_of_loralib() -> None:
    loralib = pytest.importorskip("loralib")
    model: Any = nn.Sequential(loralib.Linear(4, 6, r=2), nn.ReLU(), nn.Linear(6, 2))
    nn.init.normal_(model[0].lora_B)
    bio_model = biofx.transform(model, {"fuzzy_lr_distribution": "baseline"}).graph_module
    x = torch.randn(5, 4)
    assert not torch.allclose(
        model(x), model[2](torch.relu(nn.functional.linear(x, model[0].weight, model[0].bias)))
    )
    assert torch.equal(bio_model(x), model(x))


@pytest.mark.parametrize("name", ["AdamP", "Lion", "SGDW"])
def test_optimizers_of_pytorch_optimizer(name: str) -> None:
    package = pytest.importorskip("pytorch_optimizer")
    bio_model = with_factors()
    before = bio_model[0].weight.detach().clone()
    optimizer = getattr(package, name)(bio_model.parameters(), lr=0.01, weight_decay=0)
    plasticity = biofx.attach(bio_model, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(bio_model(torch.ones(2, 3))).backward()
        optimizer.step()
    assert plasticity.steps == 4
    assert_rows_moved_by_their_factors(before, bio_model[0].weight)
