"""What graphs ask of the type of a tensor (``torch.dtype``), as functions that tracing again keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function


def limit_of(dtype: Any, name: str) -> Any:
    """Return a number of ``torch.finfo`` of a type, or of ``torch.iinfo`` where that is one of whole numbers.

    Args:
        dtype: the type.
        name: of the number: ``min``, ``max``, ``eps``, ``tiny``, ….
    """
    if has_torch_function((dtype,)):
        return handle_torch_function(limit_of, (dtype,), dtype, name)
    limits: Any = torch.finfo if dtype.is_floating_point or dtype.is_complex else torch.iinfo
    return getattr(limits(dtype), name)


def type_from(dtype: Any, name: str) -> Any:
    """Return the real or complex type (``to_real``, ``to_complex``) that belongs to a type."""
    if has_torch_function((dtype,)):
        return handle_torch_function(type_from, (dtype,), dtype, name)
    return getattr(dtype, name)()
