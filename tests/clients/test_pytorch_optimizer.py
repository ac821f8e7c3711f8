"""All optimizers of the package pytorch_optimizer: rates act, or attach says that they cannot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from biofx.errors import PlasticityError
from tests.plasticity.displacements import Layers, errors

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

REFUSED = {
    "a2grad": "in proportion",
    "accsgd": "in proportion",
    "adahessian": "cannot be tried",
    "alice": "amplifies rounding errors",
    "alig": "cannot be tried",
    "asgd": "in proportion",
    "dadaptadagrad": "in proportion",
    "dadaptadan": "in proportion",
    "dadaptsgd": "in proportion",
    "demo": "cannot be tried",
    "focus": "in proportion",
    "ftrl": "in proportion",
    "lbfgs": "searches along a line",
    "lorarite": "cannot be tried",
    "madgrad": "in proportion",
    "magma": "attach to optimizer.optimizer",
    "nero": "in proportion",
    "prodigy": "in proportion",
    "ranger": "in proportion",
    "sara": "cannot be tried",
    "soap": "amplifies rounding errors",
    "sophiah": "cannot be tried",
    "spam": "cannot be tried",
    "spectralsphere": "cannot be tried",
    "splus": "in proportion",
    "srmm": "in proportion",
}
TINY_STEPS = ("lars", "dadaptlion")  # which drown in the rounding of float32


def made(name: str) -> Callable[..., Any]:
    optimizer: Callable[..., Any] = pytorch_optimizer.load_optimizer(name)
    return optimizer


def constructible() -> list[str]:
    names = []
    for name in pytorch_optimizer.get_supported_optimizers():
        try:
            made(name)(Layers(convolution=True).parameters())
        except Exception:
            continue  # it asks for a model, a count of steps, or groups of its own
        names.append(name)
    return names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", constructible())
def test_weights_move_in_proportion_to_their_rates(name: str) -> None:
    if name in REFUSED:
        with pytest.raises(PlasticityError, match=REFUSED[name]):
            errors(made(name))
    else:
        dtype = torch.float64 if name in TINY_STEPS else torch.float32
        assert max(errors(made(name), dtype=dtype)) <= 0.02
