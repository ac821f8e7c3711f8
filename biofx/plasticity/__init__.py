"""The state and the rules of plasticity: what a synapse's learning rate is, and where it is kept."""

from biofx.plasticity.bio_module import BioModule

__all__ = ["BioModule"]
