"""Saving a transformed model with how it was made, and loading it: ``biofx.save`` and ``biofx.load``."""

from biofx.checkpoints.checkpoint import Checkpoint, save
from biofx.checkpoints.loading import load
from biofx.checkpoints.model_state import plain_state
from biofx.checkpoints.optimizer_state import load_optimizer_state, optimizer_state
from biofx.checkpoints.sharded_checkpoint import load_sharded, save_sharded

__all__ = [
    "Checkpoint",
    "load",
    "load_optimizer_state",
    "load_sharded",
    "optimizer_state",
    "plain_state",
    "save",
    "save_sharded",
]
