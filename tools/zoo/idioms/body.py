"""What the idioms have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Example = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


class Body(nn.Module):
    """Two layers, for features of shape ``(batch, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.out = nn.Linear(6, 3)


def features(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return features ``(batch, 4)``."""
    return (torch.randn(batch, 4, generator=torch.Generator().manual_seed(batch)),), {}


def sequences(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return sequences ``(batch, length, 4)``, of another length in a batch of 4."""
    length = 7 if batch == 4 else 5
    return (torch.randn(batch, length, 4, generator=torch.Generator().manual_seed(batch)),), {}


def images(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return images ``(batch, 4, 6, 6)``."""
    return (torch.randn(batch, 4, 6, 6, generator=torch.Generator().manual_seed(batch)),), {}
