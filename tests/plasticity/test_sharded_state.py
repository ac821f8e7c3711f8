"""What a model that is not sharded keeps; what a sharded one does is in ``tests/test_distributed.py``."""

from __future__ import annotations

from torch import nn

from biofx.plasticity import BioModule
from biofx.plasticity.ranks import shard_state, whole


def test_a_whole_layer_is_left_as_it_is() -> None:
    layer = nn.Linear(2, 2)
    state = BioModule(layer)
    weight = layer.weight
    with whole(state):
        assert layer.weight is weight
    assert layer.weight is weight
    shard_state(state)
    assert state.stored_factors is None
