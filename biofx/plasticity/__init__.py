"""The state and the rules of plasticity: what a synapse's learning rate is, and where it is kept."""

from biofx.plasticity.attachment import Attachment
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.optimizer_step import LayerStep
from biofx.plasticity.rule import Rule

__all__ = ["Attachment", "BioModule", "LayerStep", "Rule"]
