"""Whether a weight looks as if it had been made by drawing its entries, or trained since.

Entries that were drawn alike can change places: units that are aligned are so by chance. Training aligns
them, along the directions that matter for the task. The fourth moment of the singular values says how much,
and is compared with that of the same entries in another order, so that their distribution is of no matter.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

ALIGNED = 1.5
"""From here on a weight looks trained. What is drawn stays below 1.4 (normal, uniform, truncated, sparse,
Gamma and log-normal entries, blocks of different scale), orthogonal and identity weights below 1; three
epochs of Adam on digits lead to 1.8 to 2.3, ten of gradient descent at 0.1 to 1.6, at 0.01 to 1.0."""
_LEAST_UNITS, _LEAST_ENTRIES = 8, 512
_MOST = 512
_ORDERS = 3
_ALL_OF_ONE_SIGN = 0.9


def looks_trained(rows: Tensor) -> bool:
    """Return whether units are more aligned than entries that were drawn alike make them.

    It cannot tell weights that are small, or trained for short or at a low rate, from fresh ones; nor an
    initialisation that aligns units on purpose from training.

    Args:
        rows: the weights of each unit, ``(units, synapses of a unit)``.
    """
    return alignment(rows) >= ALIGNED


def alignment(rows: Tensor) -> float:
    """Return the fourth moment of the singular values over that of entries in another order, dimensionless.

    Rows and columns are brought to one size before; where columns have one sign each, magnitudes are looked
    at. Of a large weight, 512 rows and columns are. 0 for a weight that is too small to tell.

    Args:
        rows: the weights of each unit, ``(units, synapses of a unit)``.
    """
    if min(rows.shape) < _LEAST_UNITS or rows.numel() < _LEAST_ENTRIES or rows.is_complex() or rows.is_meta:
        return 0.0
    part = rows.detach()[:: -(-rows.shape[0] // _MOST), :: -(-rows.shape[1] // _MOST)].cpu().float()
    if not bool(part.isfinite().all()):
        return 0.0
    one_sign = ((part > 0).any(0) & (part < 0).any(0)).logical_not()
    part = part.abs() if float(one_sign.float().mean()) > _ALL_OF_ONE_SIGN else part
    part = part - part.mean()
    generator, found = Generator().manual_seed(0), 0.0
    for _ in range(_ORDERS):
        order = torch.randperm(part.numel(), generator=generator)
        found += _fourth_moment(part.flatten()[order].reshape(part.shape)) / _ORDERS
    return _fourth_moment(part) / found if found > 0 else 0.0


def _fourth_moment(part: Tensor) -> float:
    for _ in range(2):
        for axis in (1, 0):
            part = part / part.square().mean(axis, keepdim=True).sqrt().clamp(min=1e-30)
    gram = part @ part.T if part.shape[0] <= part.shape[1] else part.T @ part
    return float(gram.square().sum(dtype=torch.float64))
