"""Activity as all ranks of a distributed run have seen it: replicas stay equal only if they agree on it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from biofx.errors import PlasticityError
from biofx.operators.distributions import Distribution
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.shards import is_sharded


def group_to_agree_with(model: nn.Module, states: Iterable[BioModule]) -> Any:
    """Return the process group of a model that is wrapped in DistributedDataParallel or sharded, else None.

    Raises:
        PlasticityError: factors follow activity, several ranks run, and the model does not say which of them
            share it.
    """
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if isinstance(model, DistributedDataParallel):
        return model.process_group
    sharded: Any = next((parameter for parameter in model.parameters() if is_sharded(parameter)), None)
    if sharded is not None:
        return sharded.device_mesh.get_group()
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several and any(follows_activity(state) for state in states):
        raise PlasticityError(
            "factors follow activity, and each rank sees its own: expected the model wrapped in "
            "DistributedDataParallel, or sharded, found it bare; attach the wrapper, so that ranks agree on "
            "the activity"
        )
    return None


def follows_activity(state: BioModule) -> bool:
    """Whether a layer's factors change with the activity of its units."""
    return state.is_dynamic and state.config.fuzzy_lr_distribution is Distribution.ACTIVITY


@torch.no_grad()
def average_activity(state: BioModule, group: Any) -> None:
    """Let all ranks of a group take the mean of what those have observed that have seen anything.

    Does nothing unless factors follow activity.
    """
    if group is not None and follows_activity(state) and state.activity is not None:
        seen = state.activity >= 0
        sums = torch.stack([state.activity * seen, seen.to(state.activity.dtype)])
        distributed.all_reduce(sums, group=group)
        mean = sums[0] / sums[1].clamp(min=1)
        state.activity.copy_(torch.where(sums[1] > 0, mean, state.activity))
