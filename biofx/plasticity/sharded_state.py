"""What is kept for each synapse of a sharded weight (FSDP2): each rank has the part that its weights need.

Factors act on the gradient of a rank's part as it arrives there, so that a step asks nothing of the other
ranks. A rule that must see the whole weight gathers it when it is due: every rank then does the same with the
same random numbers, and keeps its part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.operators.sharded_rates import ShardedRates
from biofx.plasticity.bio_state import PER_SYNAPSE, BioState
from biofx.plasticity.moments import FIRST_MOMENTS
from biofx.plasticity.shards import gathered, is_sharded, local, local_part, spread_like

_RATES = "_sharded_rates"


def shard_state(state: BioState) -> None:
    """Keep of a sharded weight's state what this rank needs; does nothing that has been done already."""
    weight = state.parameter
    if weight is None or not is_sharded(weight):
        return
    for name in PER_SYNAPSE:
        held = state._buffers[name]
        if held is not None and not is_sharded(held):
            state._buffers[name] = spread_like(held, weight)
    dampening = state.memory.dampening
    if dampening is not None and not is_sharded(dampening):
        state.memory.dampening = spread_like(dampening, weight)
    held = state.kept_factors
    if held is None or not is_sharded(held):
        return
    rates = vars(state).get(_RATES)
    if rates is None or rates.weight is not weight:
        rates = vars(state)[_RATES] = ShardedRates(weight)
    rates.belong_to(held)


@contextmanager
def whole(state: BioState, optimizer: Optimizer | None = None, *, factors: bool = True) -> Iterator[None]:
    """Let a layer have its whole weight, gradient, factors and first moments for a while.

    All ranks must do it together; of what is written, each rank keeps its part.

    Args:
        state: of the weight.
        optimizer: whose first moments are needed.
        factors: whether what is kept for each synapse is needed.
    """
    weight = state.parameter
    if weight is None or not is_sharded(weight):
        yield
        return
    owner, name = state.get_parent(), state.path.rpartition(".")[2]
    full = nn.Parameter(gathered(weight), requires_grad=weight.requires_grad)
    if weight.grad is not None:
        full.grad = gathered(weight.grad)
    moments = {} if optimizer is None else optimizer.state.get(weight, {})
    whole_moments = {key: gathered(moments[key]) for key in FIRST_MOMENTS if is_sharded(moments.get(key))}
    if optimizer is not None and whole_moments:
        optimizer.state[full] = whole_moments
    buffers = {key: held for key in PER_SYNAPSE if factors and is_sharded(held := state._buffers[key])}
    state._buffers.update({key: gathered(held) for key, held in buffers.items() if held is not None})
    dampening = state.memory.dampening
    if factors and dampening is not None:
        state.memory.dampening = gathered(dampening)
    owner._parameters[name] = full
    try:
        yield
    finally:
        owner._parameters[name] = weight
        if optimizer is not None:
            optimizer.state.pop(full, None)
        with torch.no_grad():
            _keep(full, weight)
            if weight.grad is not None and full.grad is not None:
                _keep(full.grad, weight.grad)
            for key, moment in whole_moments.items():
                _keep(moment, moments[key])
            for key, held in buffers.items():
                changed = state._buffers[key]
                if changed is not None and held is not None and changed.shape == held.shape:
                    _keep(changed, held)
                    state._buffers[key] = held
        shard_state(state)


def _keep(full: Tensor, sharded: Tensor) -> None:
    part: Any = local(sharded.detach())
    part.copy_(local_part(full, sharded))
