"""A tensor that holds a weight in bytes, and can do little else than be a layer's weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

KEEPING = (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default)


class Rounded(Tensor):
    """A weight rounded to 255 values between its extremes, as packages that quantise have theirs."""

    codes: Tensor
    step: Tensor

    @staticmethod
    def of(weight: Tensor) -> Rounded:
        """Round a weight."""
        step = weight.abs().max() / 127
        return Rounded((weight / step).round().to(torch.int8), step)

    def __new__(cls, codes: Tensor, step: Tensor) -> Any:
        """Make a tensor without storage, which shows shape and type."""
        made: Any = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=step.dtype)
        return made

    def __init__(self, codes: Tensor, step: Tensor) -> None:
        self.codes, self.step = codes, step

    def whole(self) -> Tensor:
        """The weight that it stands for."""
        return self.codes.to(self.step.dtype) * self.step

    def __repr__(self) -> str:  # type: ignore[override]
        """Shape alone: there are no values to print without computing them."""
        return f"Rounded({tuple(self.shape)})"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute a linear layer; leave everything else to :meth:`__torch_dispatch__`."""
        options = dict(kwargs or {})
        if function is torch.nn.functional.linear:
            args = [value.whole() if isinstance(value, Rounded) else value for value in args]
            options = {name: v.whole() if isinstance(v, Rounded) else v for name, v in options.items()}
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **options)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Keep what keeps the values.

        Raises:
            NotImplementedError: for anything else.
        """
        if function in KEEPING:
            return Rounded(args[0].codes, args[0].step)
        raise NotImplementedError(f"Rounded has no {function}")
