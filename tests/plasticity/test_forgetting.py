"""Tasks that are learned one after another are forgotten less where what matters for them is held back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import biofx

TASKS, EPOCHS, TRAINED = 5, 4, 1200


def accuracy(seed: int, rules: list[str], **options: Any) -> float:
    """Mean accuracy on digits whose pixels are permuted anew for each task, after the last."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    torch.manual_seed(seed)
    layers = (nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    bio, _ = biofx.transform(nn.Sequential(*layers), {"fuzzy_lr_distribution": "baseline", **options})
    generator = torch.Generator().manual_seed(seed)
    pixels = [torch.randperm(64, generator=generator) for _ in range(TASKS)]
    optimizer = torch.optim.Adam(bio.parameters(), lr=2e-3)
    plasticity = biofx.attach(bio, optimizer, rules)
    for order in pixels:
        if rules:
            plasticity.begin_task()
        for _ in range(EPOCHS):
            for chosen in torch.randperm(TRAINED, generator=generator).split(60):
                optimizer.zero_grad()
                F.cross_entropy(bio(images[chosen][:, order]), labels[chosen]).backward()
                optimizer.step()
    with torch.no_grad():
        right = [bio(images[TRAINED:, order]).argmax(1) == labels[TRAINED:] for order in pixels]
    return torch.stack(right).double().mean().item()


def test_permuted_digits_are_remembered_better() -> None:
    options = {"consolidation_strength": 1.0, "consolidation_damping": 1e-3}
    plain = accuracy(0, [])
    held = accuracy(0, ["synaptic_intelligence"], consolidation="synaptic-intelligence", **options)
    assert held > plain + 0.05  # 0.52 instead of 0.42; with another seed 0.59 instead of 0.53
