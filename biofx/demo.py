"""``biofx demo``: a plain and a rewritten network learn handwritten digits side by side.

The data are the 1797 digits of 8 x 8 pixels that scikit-learn brings along (a part of: Alpaydin, Kaynak,
"Optical recognition of handwritten digits", UCI Machine Learning Repository, 1998). Nothing is downloaded.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from biofx.capture.capture import capture
from biofx.config import BioConfig
from biofx.errors import InputError
from biofx.graph.changes import diff_graphs, render_diff
from biofx.operators.sampling import generator_for
from biofx.toml import write_whole
from biofx.transform import transform

CONFIG = BioConfig(weight_splitting_Gamma=2, apply_dales_principle=True, fuzzy_learning_rate_factor_nu=0.16)
LEARNING_RATE, MOMENTUM, BATCH = 0.05, 0.9, 64
_TEST_SIZE = 360


class Block(nn.Module):
    """Two convolutions and the way around them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Return features of the same shape, ``(batch, width, height, width)``."""
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(inner)))


class DigitNet(nn.Module):
    """A small residual network for images of shape ``(batch, 1, 8, 8)``; returns ``(batch, 10)`` logits."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.block1 = Block(width)
        self.block2 = Block(width)
        self.readout = nn.Linear(width * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        x = self.block1(torch.relu(self.stem(x)))
        x = F.max_pool2d(x, 2)
        x = F.max_pool2d(self.block2(x), 2)
        logits: Tensor = self.readout(x.flatten(1))
        return logits


@dataclass
class Run:
    """How one network's training went, epoch by epoch."""

    name: str
    losses: list[float] = field(default_factory=list)
    """Mean training loss of an epoch, in nats."""
    accuracies: list[float] = field(default_factory=list)
    """Fraction of the test digits read right after an epoch."""


def run_demo(*, seed: int = 0, epochs: int = 12, folder: Path = Path("biofx-demo")) -> list[Run]:
    """Transform a network, show what changed, train both, print a table, write curves and report.

    Args:
        seed: decides split, initial weights, order of the batches and every draw of biofx; equal seeds give
            equal numbers.
        epochs: passes over the training set, a count >= 1.
        folder: made if it is not there; gets ``curves.png``, ``report.html``, ``report.json`` and
            ``results.json``.

    Raises:
        InputError: scikit-learn or matplotlib is missing, ``epochs`` is not positive, or the folder cannot
            be made.
    """
    if epochs < 1 or seed < 0:
        raise InputError(f"expected epochs >= 1 and seed >= 0, found epochs={epochs}, seed={seed}")
    _require_extras()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {str(folder)!r}: {error.strerror}") from error
    console = Console()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain = DigitNet()
    bio, report = transform(plain, CONFIG.replace(seed=seed))
    console.rule("what biofx changes")
    console.print(render_diff(diff_graphs(capture(plain), bio)), soft_wrap=True)
    console.print(report)
    console.rule("training")
    runs = _train_both({"plain": plain, "bio": bio}, seed, epochs, console)
    console.print(_table(runs))
    report.to_html(folder / "report.html")
    write_whole(folder / "report.json", report.to_json() + "\n")
    settings = {
        "seed": seed,
        "epochs": epochs,
        "learning_rate": LEARNING_RATE,
        "momentum": MOMENTUM,
        "batch": BATCH,
    }
    results = {"settings": settings, "runs": [vars(run) for run in runs]}
    write_whole(folder / "results.json", json.dumps(results, indent=2) + "\n")
    _plot(runs, folder / "curves.png")
    console.print(
        f"wrote curves.png, report.html, report.json and results.json to {folder}",
        markup=False,
        highlight=False,
    )
    return runs


def _require_extras() -> None:
    for package, wheel in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"the demo needs {wheel}: pip install 'biofx[demo]' ({error})") from error


def _digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images and labels, then test images and labels; pixels in [0, 1]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=generator_for(seed, "split", purpose="demo"))
    test, train = order[:_TEST_SIZE], order[_TEST_SIZE:]
    return images[train], labels[train], images[test], labels[test]


def _train_both(models: dict[str, nn.Module], seed: int, epochs: int, console: Console) -> list[Run]:
    """Train the networks epoch by epoch in turn, on the same batches."""
    train_images, train_labels, test_images, test_labels = _digits(seed)
    runs = [Run(name) for name in models]
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM) for m in models.values()
    ]
    columns = (
        TextColumn("{task.description:>6}"),
        BarColumn(),
        TextColumn(
            "epoch {task.completed}/{task.total}  loss {task.fields[loss]}  test {task.fields[accuracy]}"
        ),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks = [progress.add_task(run.name, total=epochs, loss="-", accuracy="-") for run in runs]
        for epoch in range(epochs):
            order = torch.randperm(
                len(train_labels), generator=generator_for(seed, "order", epoch, purpose="demo")
            )
            for run, model, optimizer, task in zip(runs, models.values(), optimizers, tasks, strict=True):
                run.losses.append(_train_epoch(model, optimizer, train_images, train_labels, order))
                run.accuracies.append(_accuracy(model, test_images, test_labels))
                loss, accuracy = f"{run.losses[-1]:.3f}", f"{run.accuracies[-1]:.1%}"
                progress.update(task, advance=1, loss=loss, accuracy=accuracy)
    return runs


def _train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, order: Tensor
) -> float:
    model.train()
    total = 0.0
    for batch in torch.split(order, BATCH):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    return total / len(order)


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right: Tensor = model(images).argmax(1) == labels
    return right.float().mean().item()


def _table(runs: list[Run]) -> Table:
    table = Table(title="handwritten digits, 360 held out", title_justify="left")
    for column in ("network", "first loss", "last loss", "best test accuracy", "last test accuracy"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for run in runs:
        first, last = f"{run.losses[0]:.3f}", f"{run.losses[-1]:.3f}"
        table.add_row(run.name, first, last, f"{max(run.accuracies):.1%}", f"{run.accuracies[-1]:.1%}")
    return table


def _plot(runs: list[Run], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, style in zip(runs, ("o-", "s--"), strict=True):
        epochs = range(1, len(run.losses) + 1)
        left.plot(epochs, run.losses, style, label=run.name, markersize=4)
        right.plot(
            epochs, [100 * accuracy for accuracy in run.accuracies], style, label=run.name, markersize=4
        )
    left.set(xlabel="epoch", ylabel="training loss (nats)", yscale="log")
    right.set(xlabel="epoch", ylabel="test accuracy (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
