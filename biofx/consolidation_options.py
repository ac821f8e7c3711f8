"""The options of rules that hold weights back: consolidation, and regularisation towards the initial weight.

They are fields of :class:`biofx.BioConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass

from biofx.errors import OptionError
from biofx.options import FRACTION, NOT_NEGATIVE, POSITIVE, AtRule, Choice, decided_at_transform, option

CONSOLIDATIONS = ("off", "synaptic-intelligence", "elastic", "memory-aware", "upgd")
"""Values of ``consolidation``."""
_OF_TASKS = ("synaptic_intelligence", "elastic_consolidation", "memory_aware")
_CONSOLIDATING = (*_OF_TASKS, "upgd")
_HOLDING = (*_CONSOLIDATING, "l2_to_initial")


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
        rules=dict.fromkeys(_CONSOLIDATING, decided_at_transform("consolidation")),
    )
    consolidation_strength: float = option(
        1.0,
        NOT_NEGATIVE,
        """How strongly importance acts, in the units of the method's paper: c of synaptic intelligence, λ of
        the others. Values there: 0.1 to 1, hundreds to thousands (elastic), 1 (MAS).""",
        rules=dict.fromkeys(_OF_TASKS, "strength"),
    )
    consolidation_effect: str = option(
        "pull",
        Choice(("pull", "rates")),
        """How importance Ω acts: ``"pull"``, the gradient of the papers' quadratic penalty is added to that
        of the loss before each step, or ``"rates"``, each synapse's rate is divided by
        1 + strength · Ω / mean Ω of its weight. ``"upgd"`` always acts on rates.""",
        rules=dict.fromkeys(_OF_TASKS, "effect"),
    )
    consolidation_parameters: str = option(
        "all",
        Choice(("weights", "all")),
        """Which parameters consolidation and ``l2_to_initial`` act on: ``"all"``, as in the papers, or the
        ``"weights"`` of layers, look-ups and products.""",
        rules=dict.fromkeys(_HOLDING, decided_at_transform("parameters")),
    )
    consolidation_damping: float = option(
        0.1,
        POSITIVE,
        """Synaptic intelligence: ξ, which is added to the squared distance that a weight went in a task, in
        units of weight squared.""",
        rules={"synaptic_intelligence": AtRule("damping", lasts=True)},
    )
    consolidation_decay: float = option(
        1.0,
        FRACTION,
        """Elastic consolidation: γ, the share of its importance that an earlier task keeps when another one
        is consolidated, dimensionless.""",
        rules={"elastic_consolidation": AtRule("decay", lasts=True)},
    )
    upgd_utility_decay: float = option(
        0.999,
        FRACTION,
        "UPGD: β, the share of the earlier mean that the utility keeps at a step, dimensionless; below 1.",
        rules={"upgd": AtRule("utility_decay", lasts=True)},
    )
    upgd_noise: float = option(
        1e-3,
        NOT_NEGATIVE,
        "UPGD: standard deviation of the noise on gradients, in units of gradient.",
        rules={"upgd": "noise"},
    )
    upgd_scaling: str = option(
        "network",
        Choice(("network", "layer")),
        "UPGD: whether utilities are relative to the largest of the ``network`` or of their own ``layer``.",
        rules={"upgd": "scaling"},
    )
    l2_to_initial_strength: float = option(
        0.0,
        NOT_NEGATIVE,
        """How strongly the rule ``l2_to_initial`` pulls weights back to where they began: λ of Kumar et al.
        (2023). Above 0 the initial weight is kept, a buffer as large as the weight.""",
        rules={"l2_to_initial": decided_at_transform("strength", lambda given: given == 0)},
    )

    def check_consolidation(self) -> None:
        """Check what the single options do not say.

        Raises:
            OptionError: a mean that keeps all of the earlier one would never begin.
        """
        if self.upgd_utility_decay == 1:
            raise OptionError("upgd_utility_decay: expected a number in [0, 1), found 1.0")
