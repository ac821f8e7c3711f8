"""What tutorials need: digits to learn from, an ordinary training loop, how well it went, and pictures."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

Part = tuple[Tensor, Tensor]
"""Images of shape ``(samples, 1, 8, 8)``, pixels in [0, 1], and labels."""
_TEST, _BATCH = 397, 50


def digits(count: int = 1400) -> tuple[Part, Part]:
    """Return digits to learn from, at most 1400, and 397 that are held out; scikit-learn brings them."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[_TEST:][:count], order[:_TEST]
    return (images[train], labels[train]), (images[test], labels[test])


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, part: Part, epochs: int) -> None:
    """Train: a loop as you have it, with not a word of plasticity in it."""
    images, labels = part
    shuffle = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels), generator=shuffle).split(_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, part: Part) -> float:
    """Return how many digits a model reads in eval mode, in percent."""
    model.eval()
    images, labels = part
    return 100 * float((model(images).argmax(1) == labels).double().mean())


def show(path: Path) -> None:
    """Show a PNG file in a notebook; elsewhere say where it lies."""
    shell = sys.modules.get("IPython")
    if shell is None or shell.get_ipython() is None:
        print(f"drew {path}")
        return
    display = importlib.import_module("IPython.display")
    display.display(display.Image(filename=str(path)))
