"""Give a model another parameter in the place of one that it may share with the model it was made from."""

from __future__ import annotations

import torch
from torch import Tensor, nn


@torch.no_grad()
def replace_parameter(root: nn.Module, old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Put a new parameter with ``values`` wherever ``root`` holds ``old``, which is not changed.

    Args:
        root: the model.
        old: a parameter of it.
        values: any shape; moved to the old one's dtype and device.

    Returns:
        The new parameter, trained if the old one was.
    """
    new = nn.Parameter(values.detach().to(old).clone(), requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new
    return new
