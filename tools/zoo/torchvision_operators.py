"""Lets ``torchvision`` be imported where its compiled operators do not load.

The wheels on PyPI are built for torch with CUDA; beside a torch built for the CPU their library cannot be
loaded, and importing the package fails because it describes two operators that are not there. Here those
are declared, and non-maximum suppression is done in Python; models that need nothing else of the library
then work as they do with it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # an operator lives as long as its library


def declare() -> None:
    """Make the operators known, unless they are."""
    try:
        import torchvision
    except ImportError:
        return
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(name + _SIGNATURE)
        library.impl("nms", _suppressed, "CPU")
        _declared.append(library)
        import torchvision.ops.boxes

        torchvision.ops.boxes._assert_has_ops = lambda: None
        aligning: Any = sys.modules["torchvision.ops.roi_align"]
        aligning._roi_align = aligning._roi_align.__wrapped__  # it would be compiled, which takes minutes


def _suppressed(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Return the indices of boxes ``(n, 4)`` that overlap with none of a higher score, best first."""
    left = scores.argsort(descending=True, stable=True)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        corners = torch.cat(
            [
                torch.maximum(boxes[best, :2], boxes[left, :2]),
                torch.minimum(boxes[best, 2:], boxes[left, 2:]),
            ],
            1,
        )
        shared = (corners[:, 2:] - corners[:, :2]).clamp(min=0).prod(1)
        left = left[shared / (areas[best] + areas[left] - shared) <= threshold]
    return torch.stack(kept) if kept else left
