"""The 1797 digits of 8 x 8 pixels that scikit-learn brings along.

They are a part of: Alpaydin, Kaynak, "Optical recognition of handwritten digits", UCI Machine Learning
Repository, 1998.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from biofx.errors import InputError


def require_extras() -> None:
    """Check that the packages which a demo needs are there.

    Raises:
        InputError: scikit-learn or matplotlib is missing.
    """
    for package, wheel in (("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise InputError(f"the demo needs {wheel}: pip install 'biofx[demo]' ({error})") from error


def load_digits() -> tuple[Tensor, Tensor]:
    """Return images, ``(1797, 8, 8)`` with pixels in [0, 1], and labels, ``(1797,)`` from 0 to 9."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32) / 16
    return images, torch.tensor(bunch.target, dtype=torch.int64)
