"""Give a model other parameters in the place of those that it may share with the model it was made from."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Parameters:
    """Who holds each parameter of a model, looked up once.

    Args:
        root: the model; while this is used, no one else may give it other parameters.
    """

    def __init__(self, root: nn.Module) -> None:
        self._holders: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in root.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._holders.setdefault(id(parameter), []).append((module, name))

    def is_shared(self, parameter: nn.Parameter) -> bool:
        """Whether the model holds a parameter in several places."""
        return len(self._holders[id(parameter)]) > 1

    @torch.no_grad()
    def replace(self, old: nn.Parameter, values: Tensor) -> nn.Parameter:
        """Put a new parameter with ``values`` wherever the model holds ``old``, which is not changed.

        Args:
            old: a parameter of the model.
            values: any shape; moved to the old one's dtype and device.

        Returns:
            The new parameter, trained if the old one was.
        """
        new = nn.Parameter(values.detach().to(old).clone(), requires_grad=old.requires_grad)
        vars(new).update(vars(old))
        holders = self._holders.pop(id(old))
        for module, name in holders:
            module._parameters[name] = new
        self._holders[id(new)] = holders
        return new
