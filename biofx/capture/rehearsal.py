"""A copy of a model to run, put back to where it was instead of being made anew for each run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from biofx.static_inspection import is_of


class Rehearsal:
    """A model of which a run may have changed tensors that its modules hold, and nothing else.

    Args:
        model: a copy made for this, as it is to be at the start of each run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
        held = [value for module in model.modules() for value in vars(module).values()]
        held += [buffer for _, buffers in self._buffers for buffer in buffers.values()]
        self._values = [(value, value.detach().clone()) for value in held if is_of(value, Tensor)]

    def put_back(self) -> nn.Module:
        """Return the model as it was; its mode may be another."""
        for buffers, before in self._buffers:
            buffers.update(before)
        with torch.no_grad():
            for tensor, before_it in self._values:
                tensor.copy_(before_it)
        return self.model
