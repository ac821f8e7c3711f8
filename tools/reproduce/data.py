"""Images to learn from, in three parts: digits come with scikit-learn, the others are read from a folder.

Nothing is downloaded. The formats are the ones that the data sets are published in: MNIST's idx files, packed
with gzip or not, and the pickled batches of CIFAR-10's Python version.
"""

from __future__ import annotations

import functools
import gzip
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from biofx.errors import InputError

Part = tuple[Tensor, Tensor]
"""Images, ``(samples, channels, height, width)``, and labels, ``(samples,)``."""

_DIGITS_VALIDATION, _DIGITS_TEST = 300, 500
_VALIDATION = 5000
_CIFAR_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]


@dataclass(frozen=True)
class Data:
    """What is learned, what the learning rate is chosen on, and what is reported."""

    train: Part
    validation: Part
    test: Part

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        _, channels, height, width = self.train[0].shape
        return channels, height, width

    def limited(self, images: int, held_out: int | None = None) -> Data:
        """Return the same with at most so many training images, and so many to validate and to test with."""
        parts = {"train": images, "validation": held_out, "test": held_out}
        kept: dict[str, Part] = {}
        for name, count in parts.items():
            values, labels = getattr(self, name)
            kept[name] = values[:count], labels[:count]
        return Data(**kept)


def digits(seed: int) -> Data:
    """Return scikit-learn's 1797 digits, split by the seed into 997, 300 and 500; pixels in [0, 1]."""
    data = _bundled()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held_out = _DIGITS_TEST + _DIGITS_VALIDATION
    places = order[held_out:], order[:_DIGITS_VALIDATION], order[_DIGITS_VALIDATION:held_out]
    train, validation, test = ((images[place], labels[place]) for place in places)
    return Data(train, validation, test)


@functools.cache
def _bundled() -> Any:
    return load_digits()


def mnist(folder: Path) -> tuple[Part, Part]:
    """Read the training and test images of MNIST, or of Fashion-MNIST in the same files; pixels in [0, 1].

    Raises:
        InputError: a file is absent or of another format.
    """
    parts = []
    for name in ("train", "t10k"):
        images = _read_idx(folder, f"{name}-images-idx3-ubyte", dimensions=3)
        labels = _read_idx(folder, f"{name}-labels-idx1-ubyte", dimensions=1)
        _check_lengths(folder, images, labels)
        parts.append((images.unsqueeze(1).float() / 255, labels.long()))
    return parts[0], parts[1]


def cifar10(folder: Path) -> tuple[Part, Part]:
    """Read CIFAR-10's training and test images; each channel of mean 0 and deviation 1 over the training set.

    Raises:
        InputError: a file is absent or of another format.
    """
    parts = []
    inner = folder / "cifar-10-batches-py"
    source = inner if inner.is_dir() else folder
    for names in (_CIFAR_BATCHES, ["test_batch"]):
        batches = [_read_batch(source / name) for name in names]
        images, labels = (torch.cat(values) for values in zip(*batches, strict=True))
        parts.append((images.float() / 255, labels))
    deviation, mean = torch.std_mean(parts[0][0], dim=(0, 2, 3), keepdim=True)
    train, test = (((images - mean) / deviation, labels) for images, labels in parts)
    return train, test


_FILES: dict[str, Callable[[Path], tuple[Part, Part]]] = {
    "mnist": mnist,
    "fashion-mnist": mnist,
    "cifar10": cifar10,
}
DATASETS = ("digits", *_FILES)
NONE = "none"
"""The data set of an experiment that makes its data."""


def loader(dataset: str, folder: Path | None) -> Callable[[int], Data]:
    """Return what gives the data for a seed; the seed decides what training data validate.

    Args:
        dataset: one of ``DATASETS``, or ``NONE``.
        folder: where the files are; not needed for digits.

    Raises:
        InputError: the folder is not given, or a file is absent or of another format.
    """
    if dataset in ("digits", NONE):
        return digits
    if folder is None:
        raise InputError(f"{dataset}: expected --data FOLDER with its files; nothing is downloaded")
    (images, labels), test = _FILES[dataset](folder)
    held_out = min(_VALIDATION, len(labels) // 10)

    @functools.lru_cache(maxsize=1)  # runs of a seed follow one another
    def split(seed: int) -> Data:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        validation, train = order[:held_out], order[held_out:]
        return Data((images[train], labels[train]), (images[validation], labels[validation]), test)

    return split


def _check_lengths(folder: Path, images: Tensor, labels: Tensor) -> None:
    if len(images) != len(labels):
        raise InputError(f"{folder}: expected a label per image, found {len(images)} and {len(labels)}")


def _read_idx(folder: Path, name: str, *, dimensions: int) -> Tensor:
    """Read unsigned bytes: two zeros, the type 8, the number of dimensions, big-endian sizes, values."""
    packed = folder / f"{name}.gz"
    content = _content(packed if packed.exists() else folder / name)
    start = 4 + 4 * dimensions
    sizes = np.frombuffer(content[4:start], dtype=">i4").tolist() if len(content) >= start else []
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) - start != np.prod(sizes):
        raise InputError(f"{folder / name}: expected an idx file of bytes in {dimensions} dimensions")
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8, offset=start).copy()).reshape(sizes)


def _content(path: Path) -> bytes:
    opener: Callable[[Path, str], Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content: bytes = file.read()
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read {path}: {error}; nothing is downloaded") from error
    return content


class _ArraysOnly(pickle.Unpickler):
    """Reads pickled arrays; a pickle may name any function, and to call those would run a stranger's code."""

    _allowed = frozenset(
        [("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")]
        + [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return what a pickle names, if it belongs to an array."""
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"found {module}.{name}, which is no part of an array")
        # the module that has it was renamed in NumPy 2
        return np.empty(0).__reduce__()[0] if name == "_reconstruct" else super().find_class(module, name)


def _read_batch(path: Path) -> Part:
    try:
        with open(path, "rb") as file:
            return _batch_in(file)
    except (pickle.UnpicklingError, KeyError, TypeError, ValueError, EOFError, OSError) as error:
        raise InputError(f"cannot read {path} as a batch of CIFAR-10: {error}") from error


def _batch_in(file: BinaryIO) -> Part:
    batch = _ArraysOnly(file, encoding="bytes").load()
    images, labels = torch.from_numpy(np.asarray(batch[b"data"])), torch.tensor(batch[b"labels"])
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    return images.reshape(-1, 3, 32, 32), labels
