"""Factors that are spread over the ranks of a run, as their weight is (FSDP2).

In the forward the weight is whole and its factors are not, so the gradient passes backwards as it is. The
ranks add their gradients up, each for its part of the weight; what arrives there is multiplied by that part
of the factors. Gradients of earlier backwards are put aside meanwhile, since each is to be multiplied once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from biofx.errors import PlasticityError
from biofx.operators.blocks import multiply_by_blocks

Result = TypeVar("Result")
_ATTRIBUTE = "_biofx_sharded_rates"


class ShardedRates:
    """Multiplies what arrives in the gradient of one sharded weight; made once for each weight.

    Args:
        weight: sharded.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self._factors: Tensor | None = None
        self._earlier: Tensor | None = None
        self._missed = False
        self._task = -1
        weight.register_post_accumulate_grad_hook(self._arrived)

    def belong_to(self, held: Tensor) -> None:
        """Mark factors as this weight's, by an attribute that copies do not have."""
        vars(held)[_ATTRIBUTE] = self

    def expect(self, held: Tensor) -> None:
        """Prepare for the gradient of the backward that is running, which is to be multiplied by factors."""
        task = torch._C._current_graph_task_id()
        if self._factors is not None and task == self._task:
            return  # another use of the weight has prepared
        # what was put aside by a backward that failed is gone, as gradients of a failed backward are
        self._factors, self._earlier, self._missed, self._task = held, None, False, task
        if self.weight.grad is not None:
            self._earlier, self.weight.grad = self.weight.grad, None
            torch.autograd.Variable._execution_engine.queue_callback(self._put_back)

    def _arrived(self, weight: Tensor) -> None:
        """Multiply the gradient that has arrived, and add it to what there was."""
        if self._missed:
            raise PlasticityError(
                "the gradient of a sharded weight arrived after the backward that made it, on top of an "
                "earlier one, so its factors cannot be applied to it alone; call zero_grad() before each "
                "backward, or checkpoint with use_reentrant=False"
            )
        if self._factors is None:
            return
        held, gradient, earlier = self._factors, weight.grad, self._earlier
        self._factors = self._earlier = None
        if gradient is None:
            weight.grad = earlier
            return
        part = _local(gradient)
        multiply_by_blocks(part, _local(held), out=part)
        if earlier is not None:
            _local(earlier).add_(part)
            weight.grad = earlier

    def _put_back(self) -> None:
        """At the end of a backward in which no gradient arrived (gradients are not shared yet): undo."""
        if self._earlier is not None:
            self.weight.grad, self._earlier = self._earlier, None
            self._factors, self._missed = None, True


def outside_graphs(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function as it is, or one that interrupts what is being compiled, as all of FSDP does."""
    if not torch.compiler.is_compiling():
        return function
    interrupting: Callable[..., Result] = torch._dynamo.disable(function)
    return interrupting


def is_spread(factor: Tensor) -> bool:
    """Whether factors are spread over ranks."""
    return type(factor) is not Tensor and hasattr(factor, "device_mesh")


def scaled_on_arrival(weight: Tensor, held: Tensor) -> Tensor:
    """Return a whole weight unchanged; its gradient is multiplied on each rank, once it has arrived there.

    Raises:
        PlasticityError: the factors are not known to belong to a sharded weight.
    """
    rates = vars(held).get(_ATTRIBUTE)
    if not isinstance(rates, ShardedRates):
        raise PlasticityError(
            "expected factors that belong to a sharded weight, found others that are spread over ranks; call "
            "bio_model.reshard(), so that they can be told apart, and call the model itself, not its forward"
        )
    marked: Tensor = _Marked.apply(weight, rates, held)  # type: ignore[no-untyped-call]
    return marked


class _Marked(torch.autograd.Function):
    """A view forwards; backwards, word that a gradient is on its way."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rates: ShardedRates, held: Tensor) -> Tensor:
        ctx.rates, ctx.held = rates, held
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.rates.expect(ctx.held)
        return gradient, None, None


def _local(tensor: Tensor) -> Tensor:
    sharded: Any = tensor
    part: Tensor = sharded.to_local()
    return part
