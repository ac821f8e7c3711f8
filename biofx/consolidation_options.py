"""The options of rules that hold weights back: consolidation, and regularisation towards the initial weight.

They are fields of :class:`biofx.BioConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass

from biofx.errors import OptionError
from biofx.options import FRACTION, NOT_NEGATIVE, POSITIVE, Choice, option

CONSOLIDATIONS = ("off", "synaptic-intelligence", "elastic", "memory-aware", "upgd")
"""Values of ``consolidation``."""


@dataclass(frozen=True, kw_only=True)
class ConsolidationOptions:
    """What is kept of each weight to protect what it has learned, and how strongly that acts."""

    consolidation: str = option(
        "off",
        Choice(CONSOLIDATIONS),
        """What is kept of each weight so that a rule can protect those that matter for earlier tasks:
        ``"synaptic-intelligence"`` (rule ``synaptic_intelligence``, Zenke et al. 2017), ``"elastic"``
        (``elastic_consolidation``, Schwarz et al. 2018), ``"memory-aware"`` (``memory_aware``, Aljundi et al.
        2018) or ``"upgd"`` (``upgd``, Elsayed and Mahmood 2024); buffers as large as the weight.""",
    )
    consolidation_strength: float = option(
        1.0,
        NOT_NEGATIVE,
        """How strongly importance acts, in the units of the method's paper: c of synaptic intelligence, λ of
        the others. Values there: 0.1 to 1, hundreds to thousands (elastic), 1 (MAS).""",
    )
    consolidation_effect: str = option(
        "pull",
        Choice(("pull", "rates")),
        """How importance Ω acts: ``"pull"``, the gradient of the papers' quadratic penalty is added to that
        of the loss before each step, or ``"rates"``, each synapse's rate is divided by
        1 + strength · Ω / mean Ω of its weight. ``"upgd"`` always acts on rates.""",
    )
    consolidation_parameters: str = option(
        "all",
        Choice(("weights", "all")),
        """Which parameters consolidation and ``l2_to_initial`` act on: ``"all"``, as in the papers, or the
        ``"weights"`` of layers, look-ups and products.""",
    )
    consolidation_damping: float = option(
        0.1,
        POSITIVE,
        """Synaptic intelligence: ξ, which is added to the squared distance that a weight went in a task, in
        units of weight squared.""",
    )
    consolidation_decay: float = option(
        1.0,
        FRACTION,
        """Elastic consolidation: γ, the share of its importance that an earlier task keeps when another one
        is consolidated, dimensionless.""",
    )
    upgd_utility_decay: float = option(
        0.999,
        FRACTION,
        "UPGD: β, the share of the earlier mean that the utility keeps at a step, dimensionless; below 1.",
    )
    upgd_noise: float = option(
        1e-3, NOT_NEGATIVE, "UPGD: standard deviation of the noise on gradients, in units of gradient."
    )
    upgd_scaling: str = option(
        "network",
        Choice(("network", "layer")),
        "UPGD: whether utilities are relative to the largest of the ``network`` or of their own ``layer``.",
    )
    l2_to_initial_strength: float = option(
        0.0,
        NOT_NEGATIVE,
        """How strongly the rule ``l2_to_initial`` pulls weights back to where they began: λ of Kumar et al.
        (2023). Above 0 the initial weight is kept, a buffer as large as the weight.""",
    )

    def check_consolidation(self) -> None:
        """Check what the single options do not say.

        Raises:
            OptionError: a mean that keeps all of the earlier one would never begin.
        """
        if self.upgd_utility_decay == 1:
            raise OptionError("upgd_utility_decay: expected a number in [0, 1), found 1.0")
