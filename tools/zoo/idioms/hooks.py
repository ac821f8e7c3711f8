"""Hooks on the model, on what holds layers, and on layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from idioms.body import Body


def _doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def _shifted(module: nn.Module, args: Any) -> Any:
    return (args[0] + 1,)


def _tripled(module: nn.Module, inputs: Any, outputs: Any) -> Any:
    return tuple(None if gradient is None else gradient * 3 for gradient in inputs)


def _without_batch_statistics(
    module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    state[f"{prefix}made_by"] = torch.tensor(7)


class _Nested(Body):
    """A layer in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        return self.out(self.block(self.fc(x)))


class ForwardHookOnModel(_Nested):
    """A hook that changes what the model returns."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_hook(_doubled)


class PreHookOnModel(_Nested):
    """A hook that changes what the model is given."""

    def __init__(self) -> None:
        super().__init__()
        self.register_forward_pre_hook(_shifted)


class BackwardHookOnModel(_Nested):
    """A hook that changes the gradient that the model hands back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_full_backward_hook(_tripled)


class ForwardHookOnContainer(_Nested):
    """A hook that changes what a container returns."""

    def __init__(self) -> None:
        super().__init__()
        self.block.register_forward_hook(_doubled)


class PreHookOnContainer(_Nested):
    """A hook that changes what a container is given."""

    def __init__(self) -> None:
        super().__init__()
        self.block.register_forward_pre_hook(_shifted)


class BackwardHookOnContainer(_Nested):
    """A hook that changes the gradient that a container hands back."""

    def __init__(self) -> None:
        super().__init__()
        self.block.register_full_backward_hook(_tripled)


class ForwardHookOnLayer(_Nested):
    """A hook that changes what a layer returns."""

    def __init__(self) -> None:
        super().__init__()
        self.fc.register_forward_hook(_doubled)


class PreHookOnLayer(_Nested):
    """A hook that changes what a layer is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc.register_forward_pre_hook(_shifted)


class BackwardHookOnLayer(_Nested):
    """A hook that changes the gradient that a layer hands back."""

    def __init__(self) -> None:
        super().__init__()
        self.block[0].register_full_backward_hook(_tripled)


class HookOnStateDict(_Nested):
    """A hook that adds to what is saved."""

    def __init__(self) -> None:
        super().__init__()
        self.block.register_state_dict_post_hook(_without_batch_statistics)


class HookOnTensor(Body):
    """A hook on a value, set in every forward."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.fc(x)
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * 2)
        return self.out(hidden)


class CollectsByHook(_Nested):
    """Activations that a hook collects in a list and that the forward uses."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.fc.register_forward_hook(self._collect)

    def _collect(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)

    def forward(self, x: Tensor) -> Any:
        self.seen.clear()
        hidden = self.block(self.fc(x))
        return self.out(hidden + self.seen[0])


IDIOMS = (
    *(ForwardHookOnModel, PreHookOnModel, BackwardHookOnModel, ForwardHookOnContainer, PreHookOnContainer),
    *(BackwardHookOnContainer, ForwardHookOnLayer, PreHookOnLayer, BackwardHookOnLayer, HookOnStateDict),
    *(HookOnTensor, CollectsByHook),
)
