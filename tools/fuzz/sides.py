"""What a model computes and holds, and how far two of them differ."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fuzz import actions


class Side:
    """One of the two models, and the names that the lines of changes use."""

    def __init__(self, model: nn.Module, x: Tensor, batch: Any, fresh: Callable[[], Any]) -> None:
        self.seen: list[Any] = []
        helpers = {name: value for name, value in vars(actions).items() if not name.startswith("_")}
        self.names: dict[str, Any] = {**helpers, "copy": copy, "see": self.seen.append}
        self.names |= {"m": model, "x": x, "batch": batch, "fresh": fresh}

    @property
    def model(self) -> Any:
        """The model as it is now."""
        return self.names["m"]

    def change(self, text: str) -> Exception | None:
        """Run the lines of a change; return what they raise."""
        self.seen.clear()
        torch.manual_seed(zlib.crc32(text.encode()))
        try:
            exec(compile(text, "<change>", "exec"), self.names)
        except Exception as error:
            return error
        return None

    def call(self) -> dict[str, Any]:
        """Compute output, gradients, and the state that is left.

        Raises:
            Exception: whatever the model raises.
        """
        model, x = self.model, self.names["x"].detach().clone()
        if x.is_floating_point():
            x.requires_grad_()
        torch.manual_seed(5)
        model.zero_grad()
        output = model(x)
        loss = actions.loss_of(output)
        if loss.requires_grad:
            loss.backward()
        found = {f"gradient of {name}": p.grad for name, p in model.named_parameters()}
        found = {"output": output, "gradient of the input": x.grad, **found}
        found |= {f"state {name}": value for name, value in model.state_dict().items()}
        found |= {f"buffer {name}": value for name, value in model.named_buffers()}
        found = {name: copied(value) for name, value in found.items() if "bio_mod" not in name}
        model.zero_grad()
        return found


def copied(value: Any) -> Any:
    """A value that what follows does not change."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def differences(expected: Any, found: Any, tolerance: float, name: str = "what was seen") -> Iterator[str]:
    """Say what differs between two values."""
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        if expected.shape != found.shape or expected.dtype != found.dtype:
            yield f"{name}: {tuple(found.shape)} {found.dtype}, not {tuple(expected.shape)} {expected.dtype}"
        elif tolerance == 0 or not expected.is_floating_point():
            if not torch.allclose(expected.double(), found.double(), rtol=0, atol=0, equal_nan=True):
                yield f"{name}: off by {(expected.double() - found.double()).abs().max().item():.2g}"
        elif not torch.allclose(
            expected, found, rtol=tolerance, atol=tolerance * scale(expected), equal_nan=True
        ):
            yield f"{name}: off by {(expected - found).abs().max().item():.2g}"
    elif isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            yield from differences(expected.get(key), found.get(key), tolerance, str(key))
    elif (
        isinstance(expected, (list, tuple))
        and isinstance(found, (list, tuple))
        and len(expected) == len(found)
    ):
        for one, another in zip(expected, found, strict=True):
            yield from differences(one, another, tolerance, name)
    elif isinstance(expected, Tensor) or isinstance(found, Tensor) or expected != found:
        yield f"{name}: {kind_of(found)}, not {kind_of(expected)}"


def scale(value: Tensor) -> float:
    """The largest number of a tensor, at least 1e-2.

    Below that are gradients of biases that a normalisation takes away, which are 0 but for rounding.
    """
    finite = value[value.isfinite()]
    return max(finite.abs().max().item() if finite.numel() else 0.0, 1e-2)


def kind_of(value: Any) -> str:
    """A value in a word."""
    return "a tensor" if isinstance(value, Tensor) else repr(value)
