"""How a copied optimizer keeps its plasticity, although torch copies no step hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer


class CarriedDefaults(dict[str, Any]):
    """An optimizer's default options, which take what is attached to it along wherever it is copied.

    Of all that an optimizer holds, its state, groups and defaults are copied and pickled, and of these only
    the defaults are no part of its state dict.
    """

    def __init__(self, options: Mapping[str, Any], attachments: list[Any]) -> None:
        super().__init__(options)
        self.attachments = attachments

    def __reduce_ex__(self, protocol: Any) -> Any:
        return CarriedDefaults, (dict(self), self.attachments)


def carry(optimizer: Optimizer, attachment: Any) -> None:
    """Let copies of an optimizer be attached as it is."""
    defaults = vars(optimizer).get("defaults")
    if isinstance(defaults, CarriedDefaults):
        defaults.attachments.append(attachment)
    elif type(defaults) is dict:
        optimizer.defaults = CarriedDefaults(defaults, [attachment])


def let_go(optimizer: Optimizer, attachment: Any) -> None:
    """Undo :func:`carry`."""
    defaults = vars(optimizer).get("defaults")
    if isinstance(defaults, CarriedDefaults):
        defaults.attachments[:] = [kept for kept in defaults.attachments if kept is not attachment]
        if not defaults.attachments:
            optimizer.defaults = dict(defaults)


def carried(optimizer: Optimizer) -> list[Any]:
    """Return what is attached to an optimizer."""
    defaults = vars(optimizer).get("defaults")
    return list(defaults.attachments) if isinstance(defaults, CarriedDefaults) else []
