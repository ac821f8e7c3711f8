"""The plasticity rules of one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from biofx.config import FROM_SEED, BioConfig
from biofx.errors import PlasticityError
from biofx.operators.mask_ops import existing, mask_weight
from biofx.operators.parts import gathered, is_sharded, local, local_part
from biofx.operators.rate_ops import multiply_by_blocks
from biofx.operators.rate_sampling import (
    CHANGING,
    Distribution,
    RateSampling,
    following_factors,
    most_spread,
    pooled_magnitude,
    rate_sampling,
    relative_smallness,
    sampling_options,
)
from biofx.operators.sampling import generator_for
from biofx.operators.sign_ops import project_gradient, write_signs
from biofx.plasticity.consolidated_state import HOLDING, ConsolidatedState
from biofx.plasticity.initial_weights import ZERO, InitialWeights, initial_weights, shrink_and_perturb
from biofx.plasticity.optimizers import forget_direction, lend_step_sizes
from biofx.plasticity.owned_blocks import lies_in_blocks
from biofx.plasticity.rate_rules import (
    crystallize,
    evolve,
    multiply_by_volume,
    volume_factors,
)
from biofx.plasticity.rejuvenation import check_finite, protection_for, rejuvenate
from biofx.plasticity.rules_in_parts import (
    check_part,
    rejuvenate_part,
    scale_inputs_of_part,
    volume_factors_of_part,
)
from biofx.plasticity.saved_state import stored_as
from biofx.plasticity.selection import BelowMean, LowestShare, Utility, follow_utility
from biofx.plasticity.shards import flat_span, sum_over_ranks
from biofx.plasticity.turnover import turn_over
from biofx.plasticity.unit_inputs import broadcast_units, input_strength, synaptic_scaling
from biofx.plasticity.unit_turnover import NOT_WATCHED
from biofx.plasticity.unit_turnover_run import UnitRun, turn_over_units

_UPDATE = "update_fuzzy_learning_rates"
_NEED_GRADIENT = frozenset({"fuzzy_learning_rates", "volume_dependent_lr", "crystallize", *HOLDING})
_CHANGE_FACTORS = frozenset({"update_fuzzy_learning_rates", "crystallize"})
_NEED_SYNAPSES = frozenset(
    {"rejuvenate_weights", "synaptic_scaling", "enforce_dales_principle", "shrink_and_perturb"}
)
_NEED_FACTORS = _CHANGE_FACTORS | {"fuzzy_learning_rates"}


class BioModule(ConsolidatedState):
    """State and rules of one weight's plasticity, kept in the layer as ``layer.bio_mod``.

    Every rule returns how many synapses it touched, and raises a :class:`PlasticityError` where
    :meth:`why_not` has a reason against it.

    Args:
        parent: the layer, or a function that returns it.
        config: options of the rules. With one, factors are sampled at once; without, a pass adds them.
    """

    exposed_functions: ClassVar[tuple[str, ...]] = (
        "fuzzy_learning_rates",
        "update_fuzzy_learning_rates",
        "volume_dependent_lr",
        "crystallize",
        "rejuvenate_weights",
        "rejuvenate_units",
        "enforce_dales_principle",
        "synaptic_scaling",
        "shrink_and_perturb",
        *HOLDING,
    )
    """Methods that a converted model offers, calling them on every layer."""

    def __init__(
        self, parent: nn.Module | Callable[[], nn.Module] | None = None, config: BioConfig | None = None
    ) -> None:
        super().__init__(parent, config)
        if parent is not None and config is not None and self.parameter is not None:
            self.draw()

    def why_not(self, rule: str) -> str | None:
        """Return why a rule leaves this layer alone, None if it does not."""
        reason = self.why_never(rule)
        if reason is not None or rule == "rejuvenate_units":
            return reason
        if rule in _NEED_GRADIENT and self.weight.grad is None:
            reason = "its weight has no gradient"
        probe = self.connection_probe
        if reason is None and rule == "rejuvenate_weights" and probe is not None and probe.grad is None:
            reason = (
                "its connections grow by their gradient, which is collected for steps at which biofx.attach "
                "runs the rule"
            )
        utility = self.utility
        if reason is None and rule == "rejuvenate_weights" and utility is not None:
            first = local(utility).flatten()[:1]
            if len(first) and float(first) < 0:
                reason = (
                    "its utility is the mean of abs(weight · gradient), and no gradient has been seen: "
                    "biofx.attach looks at each, bio_mod.observe_utility() at one after a backward"
                )
        return reason

    def why_never(self, rule: str) -> str | None:
        """Return why a rule would leave this layer alone even if it had a gradient, None if it would not."""
        weight = self.parameter
        if weight is None:
            return "its weight is computed by a parametrization, not a parameter"
        if not weight.requires_grad and rule != "enforce_dales_principle":
            return "its weight is frozen"
        if rule in HOLDING:
            return self.why_not_held(rule)
        if self.only_held:
            return "it is no weight of a layer, and only rules that hold parameters back act on it"
        if self.why_no_synapses and rule in _NEED_SYNAPSES:
            return self.why_no_synapses
        if rule == "rejuvenate_units":
            return self.turnover if isinstance(self.turnover, str) else self.turnover.why_never(self)
        if rule in _NEED_FACTORS and not (self.has_factors if rule == _UPDATE else self.has_rates):
            return "it has no learning-rate factors"
        if rule in _CHANGE_FACTORS and self.is_drawn:
            return "its factors are sampled from their seed at each use; use fuzzy_lr_dtype='float32'"
        if rule == "enforce_dales_principle" and not self.is_constrained:
            return "its presynaptic units have no signs"
        if rule == "update_fuzzy_learning_rates" and not self.is_dynamic:
            return "its factors do not change (fuzzy_lr_dynamic=False, or a static distribution)"
        if rule == "fuzzy_learning_rates" and self.scaled_in_graph:
            return "its gradient is scaled in the graph already"
        redraws = rule == "rejuvenate_weights" and self.config.rejuvenation_redraw == "initial"
        if (redraws or rule == "shrink_and_perturb") and isinstance(reason := initial_weights(self), str):
            return reason
        return None

    def check(self, rule: str) -> None:
        """Check the values that a rule uses, before any layer is changed.

        Raises:
            NonFiniteWeightError: the weight is NaN or infinite and the rule is ``"rejuvenate_weights"``.
        """
        if rule != "rejuvenate_weights":
            return
        if self.acts_in_parts(rule):
            check_part(self.weight, self.path)
        else:
            check_finite(self.masked_weight, self.path)

    def acts_in_parts(self, rule: str) -> bool:
        """Whether each rank can run a rule on its part of a sharded weight, without the parts of the others.

        The weight must be sharded along its first axis over one dimension of a mesh. Volume-dependent rates
        must not be normalised (``base_lr=None``), units of synaptic scaling lie along that axis, and
        rejuvenation choose each weight with its chance, by its magnitude, without a mask or importance; all
        ranks must ask together, for whether a rate is 0 somewhere.
        """
        weight, config = self.parameter, self.config
        if weight is None or not lies_in_blocks(weight):
            return False
        if rule == "rejuvenate_weights":
            kept = self.connection_mask, self.utility, self.importance, self._selection()
            return all(held is None for held in kept) and not self._has_zero_rates()
        if rule == "volume_dependent_lr":
            return config.base_lr is not None
        return rule == "shrink_and_perturb" or (rule == "synaptic_scaling" and self.output_axis == 0)

    def _has_zero_rates(self) -> bool:
        """Whether a rate of a sharded weight is 0 on some rank."""
        held = self._part_of_zero_rates()
        found = torch.tensor(int(held is not None), device=local(self.weight.detach()).device)
        return bool(sum_over_ranks(found, self.weight))

    def _part_of_zero_rates(self) -> Tensor | None:
        """Return where the rates of this rank's part of the weight are 0, None if they are nowhere."""
        if self.is_drawn and self.config.fuzzy_lr_bounds[0] > 0:
            return None
        factors = self.fuzzy_learning_rate_parameters
        if factors is None:
            return None
        part = local_part(factors, self.weight) == 0
        return part.expand(local(self.weight.detach()).shape) if bool(part.any()) else None

    def _masked_part(self) -> Tensor:
        """Return this rank's part of the weight, 0 where no connection exists."""
        weight, mask = self.weight.detach(), self.connection_mask
        return local(weight) if mask is None else mask_weight(local(weight), local_part(mask, weight))

    # learning-rate factors

    @property
    def is_dynamic(self) -> bool:
        """Whether the factors change during training."""
        return self.config.fuzzy_lr_dynamic and self.config.fuzzy_lr_distribution in CHANGING

    @property
    def follows_activity(self) -> bool:
        """Whether the factors change with the activity of the layer's units."""
        return self.is_dynamic and self.config.fuzzy_lr_distribution is Distribution.ACTIVITY

    def draw(self) -> None:
        """Sample the factors that the config asks for, in place of any others.

        Raises:
            PlasticityError: the graph samples the factors itself, and from something else.
        """
        sampling, form = self._configured_sampling(), self.config.fuzzy_lr_dtype
        if self.scaled_in_graph and self.is_drawn:
            if form != FROM_SEED or sampling != self.rate_sampling:
                raise PlasticityError(
                    f"{self.path!r}: the graph samples its factors at each backward, with other options than "
                    "those of the config; transform the model again"
                )
            return
        if form == FROM_SEED and self.scaled_in_graph and self.has_factors:
            form = "float32"  # a graph that reads stored factors cannot sample them
        self.start_factors(sampling, form, self.weight)
        self.keep_buffers()

    def redrawn(self) -> Tensor | None:
        """Return the factors that :meth:`draw` would store now, sampled again; None where none are stored."""
        held, config = self.stored_factors, self.config
        if held is None:
            return None
        mask = self.connection_mask
        factors, _ = self._configured_sampling().sample(self.weight, None if mask is None else existing(mask))
        return stored_as(config.fuzzy_lr_dtype, factors, *config.fuzzy_lr_bounds)

    def _configured_sampling(self) -> RateSampling:
        """Return what the config asks factors to be sampled from."""
        config = self.config
        return rate_sampling(
            **sampling_options(
                config.fuzzy_lr_distribution,
                nu=config.fuzzy_learning_rate_factor_nu,
                low=config.fuzzy_lr_min,
                high=config.fuzzy_lr_max,
                log_low=config.fuzzy_lr_log_min,
                log_high=config.fuzzy_lr_log_max,
                seed=config.seed,
                path=self.path,
                depth=self.depth,
                granularity=config.fuzzy_lr_granularity,
                output_axis=self.output_axis,
            )
        )

    def keep_buffers(self) -> None:
        """Add or remove the buffers that rules with these options need."""
        self.keep_diversity()
        self.keep_consolidation()
        weight, held = self.parameter, self.utility
        judges = self.config.rejuvenation_utility == "gradient" and not self.only_held
        if not judges or weight is None or weight.is_complex():
            self.utility = None
        elif held is None or held.shape != weight.shape:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.utility = torch.full(weight.shape, -1.0, dtype=dtype, device=weight.device)
        if self.config.rejuvenation_selection != "proportion" or weight is None:
            self.weights_due = None
        elif self.weights_due is None:
            self.weights_due = torch.zeros((), dtype=torch.float64, device=weight.device)

    def keep_diversity(self) -> None:
        """Add or remove the buffer of dynamic factors as they would be without crystallization."""
        held = self.stored_factors
        if not self.is_dynamic or held is None or held.shape != self.weight.shape:
            self.diversity = None
        elif self.diversity is None:
            self.diversity = held.clone()

    def provide_factors(self) -> None:
        """Give every synapse a rate that can be dampened, where it has no factor."""
        if not self.has_rates and not self.only_held:
            self._start_dampening()

    def _start_dampening(self) -> Tensor:
        ones = torch.ones(self.weight.shape, dtype=torch.float32, device=self.weight.device)
        self.memory.dampening = ones
        return ones

    @property
    def acting_factors(self) -> Tensor | None:
        """What multiplies the learning rates: the factors, dampened by crystallization; None for nothing.

        Of a sharded weight it may be this rank's part.
        """
        factors, dampening = self.fuzzy_learning_rate_parameters, self.memory.dampening
        if dampening is None:
            return factors
        if factors is None:
            return dampening
        part = local_part(factors, dampening)
        return torch.maximum(part * local(dampening), part.clamp(max=self.config.crystal_min))

    @torch.no_grad()
    def fuzzy_learning_rates(self) -> int:
        """Multiply the weight's gradient by the factors; call it once, between backward and step.

        When: only for a model of :class:`biofx.BioConverter` that is not attached. A transformed model does
        it in its graph, and :func:`biofx.attach` does it for both.
        """
        self._require("fuzzy_learning_rates")
        gradient, held, sampling = self._gradient(), self.stored_factors, self.rate_sampling
        part = local(gradient)
        if self.memory.dampening is not None:
            part.mul_(local_part(cast(Tensor, self.acting_factors), gradient).to(part.dtype))
        elif sampling is not None and part is gradient:
            sampling.multiply(part, out=part)
        else:
            factors = self._factors() if held is None else held
            multiply_by_blocks(part, local_part(factors, gradient), out=part)
        return gradient.numel()

    @torch.no_grad()
    def update_fuzzy_learning_rates(self, x: Tensor | None = None) -> int:
        """Change dynamic factors; call it once per training step.

        Temporal factors follow a stationary autoregressive process, those that follow weights or activity are
        computed anew (:mod:`biofx.plasticity.rate_rules`,
        :mod:`biofx.operators.rate_sampling`).

        When: at every step, with ``fuzzy_lr_dynamic=True`` and a distribution that can change.

        Args:
            x: not needed: activity is observed in the graph, during the forward.
        """
        self._require("update_fuzzy_learning_rates")
        self.memory.steps += 1
        config = self.config
        nu, low, high = config.fuzzy_learning_rate_factor_nu, config.fuzzy_lr_min, config.fuzzy_lr_max
        if config.fuzzy_lr_distribution is Distribution.TEMPORAL:
            if self.steps % config.fuzzy_lr_update_freq:
                return 0
            before = self._factors() if self.diversity is None else self.diversity
            changed = local(before).clone()
            evolve(
                changed,
                correlation=config.fuzzy_lr_decay,
                nu=nu,
                low=low,
                high=high,
                generator=self._generator("evolve"),
                place=flat_span(before),
                total=before.numel(),
            )
        elif self.noise is not None:
            generator = generator_for(config.seed, self.path, self.steps, purpose="follow")
            smallness = self._smallness()
            if isinstance(smallness, Tensor):
                smallness = local_part(smallness, self.noise)
            changed = following_factors(
                local(self.noise), smallness, nu=nu, low=low, high=high, generator=generator
            )
        else:
            return 0
        return self._change_factors(changed)

    @property
    def follows_in_parts(self) -> bool:
        """Whether each rank can change its part of dynamic factors without the parts of the others."""
        held, config = self.stored_factors, self.config
        if held is None or not is_sharded(held):
            return True
        if config.fuzzy_lr_distribution is Distribution.TEMPORAL:
            return flat_span(held) is not None
        if config.fuzzy_lr_distribution is Distribution.WEIGHT_ADAPTIVE and self.connection_mask is not None:
            return False  # a mask is whole
        reach = most_spread(config.fuzzy_learning_rate_factor_nu)
        # else numbers out of bounds are sampled again, for all ranks in one order
        return 1 - reach >= config.fuzzy_lr_min and 1 + reach <= config.fuzzy_lr_max

    def _change_factors(self, changed: Tensor) -> int:
        """Write new values to dynamic factors; those that crystallization dampened stay dampened as much."""
        factors, before = local(self._factors()), self.diversity
        if before is None:
            factors.copy_(changed)
        else:
            before = local(before)
            dampening = torch.where(before > 0, factors / before, 1.0)
            floor = changed.clamp(max=self.config.crystal_min)
            factors.copy_(torch.maximum(changed * dampening, floor))
            before.copy_(changed)
        return self._factors().numel()

    def _smallness(self) -> Tensor | float:
        """Return what weights, or activity, make of the spread of each factor."""
        granularity, groups = self.config.fuzzy_lr_granularity, self.groups
        if self.config.fuzzy_lr_distribution is Distribution.WEIGHT_ADAPTIVE:
            magnitude = pooled_magnitude(self.masked_weight, granularity, self.output_axis).float()
            mask = self.connection_mask
            return relative_smallness(magnitude, None if mask is None else existing(mask))
        activity = self.observed_activity
        if activity is None or granularity == "layer":
            return 1.0
        smallness = torch.where(activity.min() < 0, 1.0, relative_smallness(activity))  # none seen yet
        if granularity == "neuron" and self.output_axis == 1:
            smallness, groups = smallness.reshape(groups, -1).mean(0), 1
        return broadcast_units(smallness, self.weight, output_axis=self.output_axis, groups=groups)

    # rules on gradients

    @torch.no_grad()
    def volume_dependent_lr(self) -> int:
        """Multiply the weight's gradient by volume-dependent factors; call it between backward and step.

        Large weights move less: base · exp(-stability · abs(w) / (abs(w) + s)) · abs(N(1, variability²)),
        with s the mean magnitude of the layer (:mod:`biofx.plasticity.rate_rules`).

        When: at every step.
        """
        self._require("volume_dependent_lr")
        gradient = self._gradient()
        if self.acts_in_parts("volume_dependent_lr"):
            part = local(gradient)
            part.mul_(self.volume_factors().to(part.dtype))
            return gradient.numel()
        multiply_by_volume(gradient, self.masked_weight, **self._volume_options())
        return gradient.numel()

    def volume_factors(self) -> Tensor:
        """Sample volume-dependent factors for the current weight, dimensionless.

        They are shaped like it, or where ranks can do so in parts like this rank's part of it.
        """
        if self.acts_in_parts("volume_dependent_lr"):
            options = self._volume_options()
            del options["exists"]
            return volume_factors_of_part(self.weight, self._masked_part(), self.connections, **options)
        return volume_factors(self.masked_weight, **self._volume_options())

    def _volume_options(self) -> dict[str, Any]:
        config = self.config
        return {
            "base": config.base_lr,
            "stability": config.stability_factor,
            "variability": config.lr_variability,
            "generator": self._generator("volume"),
            "exists": None if self.connection_mask is None else existing(self.connection_mask),
        }

    @torch.no_grad()
    def unscale_gradient(self, factors: Tensor) -> None:
        """Divide the gradient by the factors that the graph has applied to it, except for those of 0.

        Args:
            factors: as they were during backward.
        """
        gradient = self._gradient()
        part = local(gradient)
        part.copy_(_divided(part, local_part(factors, gradient)))

    @torch.no_grad()
    def unscale_probe(self) -> None:
        """Divide the gradient of missing connections by the factors that the graph has applied to it."""
        probe = self.connection_probe
        if probe is None or probe.grad is None or not self.scaled_in_graph:
            return
        probe.grad.copy_(_divided(probe.grad, gathered(self._factors())))

    @torch.no_grad()
    def project_probe(self) -> None:
        """Take out of the gradient of missing connections what leads away from the signs of units.

        The graph does it where gradients are one rank's alone; to be called with the whole weight.
        """
        probe = self.connection_probe
        if (
            probe is None
            or probe.grad is None
            or not self.is_constrained
            or self.config.dales_method == "abs"
        ):
            return
        project_gradient(probe.grad, self.masked_weight, self.signs())

    @torch.no_grad()
    def crystallize(self) -> int:
        """Dampen the factors of settled and of shaken synapses; call it between backward and scaling.

        Settled: 0 < abs(gradient) / abs(weight) < ``crystal_thresh``. Shaken: abs(gradient) above the mean
        magnitude of the layer. Each run multiplies their factors, down to a floor
        (:mod:`biofx.plasticity.rate_rules`).

        When: late in training, or at every tenth step or so: what is dampened stays so.
        """
        self._require("crystallize")
        factors, weight = self.fuzzy_learning_rate_parameters, self.weight.detach()
        gradient, strength, mean = local(self._gradient()), local(weight), None
        mask = self.connection_mask
        if self.scaled_in_graph and factors is not None:
            gradient = _divided(gradient, local_part(factors, weight))
        if self.gradient_level != 1:
            gradient = gradient / self.gradient_level
        rates, floor = self.memory.dampening, self.config.crystal_min
        if factors is not None and self._dampens_factors:
            rates = factors
        elif rates is None:
            rates = self._start_dampening()
        if is_sharded(weight) or mask is not None:
            total = strength if mask is None else mask_weight(strength, local_part(mask, weight))
            count = weight.numel() if self.connections is None else self.connections
            mean = float(sum_over_ranks(total.norm(1), weight)) / max(1, count)
        caught = crystallize(
            strength,
            gradient,
            local(rates),
            threshold=self.config.crystal_thresh,
            dampening=self.config.dampening_factor,
            floor=floor if factors is None or rates is factors else floor / local_part(factors, weight),
            mean=mean,
        )
        return int(sum_over_ranks(torch.tensor(caught, device=strength.device), weight))

    @property
    def _dampens_factors(self) -> bool:
        """Whether crystallization writes to the factors, of which each synapse has one to itself."""
        held = self.stored_factors
        own = held is not None and held.shape == self.weight.shape
        return own and self.memory.dampening is None and (not self.is_dynamic or self.diversity is not None)

    @property
    def crystallizes_in_parts(self) -> bool:
        """Whether each rank can dampen the factors of its part without the parts of the others."""
        held = self.stored_factors if self._dampens_factors else self.memory.dampening
        return held is not None and is_sharded(held)

    @torch.no_grad()
    def observe_utility(self) -> None:
        """Follow abs(weight · gradient) of each synapse, without rates; does nothing if unused.

        Attached, each step does it, or each of ``rejuvenation_utility_every``; with a decay of 0, where
        ``rejuvenate_weights`` has a schedule, only those at which it is due. Entries that are not finite are
        left out.
        """
        if (utility := self.utility) is None:
            return
        gradient, weight, held = local(self._gradient()), local(self.weight.detach()), local(utility)
        if self.scaled_in_graph:  # where a factor is 0, so is the gradient
            factors = local_part(self._factors(), self.weight).clamp(min=torch.finfo(torch.float32).tiny)
            gradient = gradient / factors.to(gradient.dtype)
        follow_utility(
            held,
            weight,
            gradient if self.gradient_level == 1 else gradient / self.gradient_level,
            decay=self.config.rejuvenation_utility_decay,
        )

    # rules on weights

    @torch.no_grad()
    def rejuvenate_weights(self, optimizer: Optimizer | None = None) -> int:
        """Replace weak synapses by new ones; returns how many.

        When: every hundred steps or more, after the network has learned something (``after=``). Formulas and
        sources: :mod:`biofx.plasticity.rejuvenation`.

        Of a weight with a mask, weak connections vanish, and as many grow elsewhere
        (:mod:`biofx.plasticity.turnover`); how many there are stays. Those with a learning-rate factor of 0
        stay as they are.

        By magnitude this does not prevent loss of plasticity, and with the magnitudes of survivors it makes
        it worse, since dead units keep large weights, which magnitude protects. Error of the last 20 % of
        600k steps of a slowly changing regression (Dohare et al. 2024; 20 runs, SGD at 0.01; plain
        1.10 ± 0.05): 1.51 so, 1.22 redrawn from the initial distribution; by
        ``rejuvenation_utility="gradient"``, redrawn from it, 0.98; by turnover of units 0.56 ± 0.02.

        Args:
            optimizer: its first moments of the replaced synapses become 0, its second moments stay; those
                of connections that grow where none was become the mean of the others, if they are smaller.

        Raises:
            NonFiniteWeightError: a weight is NaN or infinite; nothing has been changed.
        """
        self._require("rejuvenate_weights")
        turnover = self.config.rejuvenation_turnover
        protection = self.config.rejuvenation_parameter_dre if turnover is None else protection_for(turnover)
        if self.acts_in_parts("rejuvenate_weights"):
            return rejuvenate_part(
                self.weight,
                protection=protection,
                generator=self._generator("rejuvenate"),
                sign=self.signs(),
                initial=self._redrawn_from(),
                optimizer=optimizer,
                name=self.path,
            )
        options: dict[str, Any] = {
            "protection": protection,
            "generator": self._generator("rejuvenate"),
            "sign": self.signs(),
            "initial": self._redrawn_from(),
            "utility": self._judged_by(),
            "stays": self.zero_rates(),
            "selection": self._selection(),
            "name": self.path,
        }
        if self.connection_mask is None:
            replaced = rejuvenate(self.weight.data, **options)
            count = len(replaced)
        else:
            layout, areas = self.connection_layout, self.connection_areas
            blocks = None if areas is None else layout.blocks(self.weight.shape, areas)
            gradient = None if self.connection_probe is None else self.connection_probe.grad
            moved = turn_over(
                self.weight.data, self.connection_mask, layout, blocks=blocks, gradient=gradient, **options
            )
            replaced, count = moved.places, moved.pruned
            if optimizer is not None:
                settled = existing(self.connection_mask).flatten()
                settled[replaced] = False
                lend_step_sizes(optimizer, self.weight, moved.new, settled.nonzero().flatten())
        if optimizer is not None:
            forget_direction(optimizer, self.weight, replaced)
        self.forget_importance(replaced)
        return count

    @property
    def turnover(self) -> Any:
        """What is turned over with the weight's units (a ``UnitTurnover``), or words on why they stay."""
        return self.__dict__.get("_turnover", NOT_WATCHED)

    def turns_over(self, turnover: Any) -> None:
        """Let ``rejuvenate_units`` replace the weight's units, or say why it does not."""
        self.__dict__["_turnover"] = turnover

    @torch.no_grad()
    def rejuvenate_units(self, optimizer: Optimizer | None = None) -> int:
        """Replace units of low utility, or dormant ones, by new ones; returns how many.

        What that means is in :mod:`biofx.plasticity.unit_turnover`. Ages count runs of the rule.

        When: throughout a training that goes on, at every step or at every tenth, with ``unit_turnover`` set
        when the model is transformed.

        Args:
            optimizer: what it remembers of the replaced units' weights becomes 0.

        Raises:
            NonFiniteWeightError: a weight of the units is NaN or infinite; no weight has been changed.
            PlasticityError: the optimizer holds only some of the parameters that would be changed; none is.
        """
        self._require("rejuvenate_units")
        (replaced,) = turn_over_units([unit_run_of(self)], optimizer)
        return replaced

    @torch.no_grad()
    def enforce_dales_principle(self) -> int:
        """Write the sign constraint into the weight itself; returns how many synapses it changed.

        When: after each step of a model of :class:`biofx.BioConverter` without an attachment. In a
        transformed model the graph constrains what acts at every forward.
        """
        self._require("enforce_dales_principle")
        return int(self.write_signs_back())

    @torch.no_grad()
    def write_signs_back(self) -> Tensor:
        """Do what :meth:`enforce_dales_principle` does; return the count without waiting for it, ``()``."""
        weight, signs = local(self.weight), local_part(self.signs(), self.weight)
        return write_signs(weight.detach(), signs.to(weight.dtype), flip=self.config.dales_method == "abs")

    @torch.no_grad()
    def synaptic_scaling(self) -> int:
        """Move each unit's total input strength back towards its value at the first call.

        All inputs of a unit are multiplied by the same number, so that their total magnitude goes
        ``synaptic_scaling_rate`` of the way (:mod:`biofx.plasticity.unit_inputs`).

        When: from the first step on, at every step or at every tenth.
        """
        self._require("synaptic_scaling")
        layout: dict[str, int] = {"output_axis": self.output_axis, "groups": self.groups}
        target, rate = self.memory.target_strength, self.config.synaptic_scaling_rate
        if self.acts_in_parts("synaptic_scaling"):
            known = None if target is None or target.shape != (self.units,) else target
            self.memory.target_strength = scale_inputs_of_part(self.weight, self._masked_part(), known, rate)
            return self.weight.numel()
        if target is None or target.shape != (self.units,):
            target = self.memory.target_strength = input_strength(self.masked_weight, **layout)
        if self.connection_mask is not None:  # what a checkpoint has where no connection exists
            self.weight.data.copy_(self.masked_weight)
        synaptic_scaling(self.weight.data, target, rate=rate, **layout)
        return self.weight.numel()

    @torch.no_grad()
    def shrink_and_perturb(self) -> int:
        """Shrink all weights, and add a draw of their initial distribution; returns how many changed.

        When: at every step with a factor close to 1, or with a small one when a task begins. What is drawn
        from: :mod:`biofx.plasticity.initial_weights`.

        Those with a factor of 0 stay, missing connections stay 0, and signs hold: what a draw would give
        another sign is treated as after a step of the optimizer.
        """
        self._require("shrink_and_perturb")
        initial, mask = initial_weights(self), self.connection_mask
        if isinstance(initial, str):
            raise PlasticityError(f"shrink_and_perturb cannot act on {self.path!r}: {initial}")
        in_parts = self.acts_in_parts("shrink_and_perturb")
        stays = self._part_of_zero_rates() if in_parts else self.zero_rates()
        if mask is not None:
            missing = ~existing(local(mask) if in_parts else mask)
            stays = missing if stays is None else stays | missing
        changed = shrink_and_perturb(
            local(self.weight.detach()) if in_parts else self.weight.data,
            initial,
            factor=self.config.shrink_factor,
            perturbation=self.config.shrink_perturbation,
            generator=self._generator("shrink-and-perturb"),
            stays=stays,
            place=flat_span(self.weight) if in_parts else None,
            total=self.weight.numel(),
        )
        if in_parts:
            changed = int(
                sum_over_ranks(torch.tensor(changed, device=local(self.weight).device), self.weight)
            )
        if self.is_constrained:
            self.enforce_dales_principle()
        return changed

    def _judged_by(self) -> Utility | None:
        """Return what weights are judged by, None for their magnitude."""
        utility = self.utility
        return None if utility is None else Utility(utility, self.config.rejuvenation_turnover)

    def _selection(self) -> LowestShare | BelowMean | None:
        """Return how weights are chosen, None for each with its chance."""
        config, due = self.config, self.weights_due
        if config.rejuvenation_threshold is not None:
            return BelowMean(config.rejuvenation_threshold)
        if due is None or config.rejuvenation_turnover is None:
            return None
        return LowestShare(config.rejuvenation_turnover, due)

    def _redrawn_from(self) -> InitialWeights | None:
        """Return what the weights of new synapses are drawn from, None for magnitudes as others have."""
        redraw = self.config.rejuvenation_redraw
        found = initial_weights(self) if redraw == "initial" else ZERO if redraw == "zero" else None
        return None if isinstance(found, str) else found

    def _gradient(self) -> Tensor:
        gradient = self.weight.grad
        if gradient is None:
            raise PlasticityError(f"{self.path!r} has no gradient; call backward first")
        if gradient.layout is not torch.strided:
            raise PlasticityError(f"{self.path!r} has a sparse gradient, and factors are dense (sparse=True)")
        return gradient

    def _factors(self) -> Tensor:
        factors = self.fuzzy_learning_rate_parameters
        if factors is None:
            raise PlasticityError(f"{self.path!r} has no learning-rate factors")
        return factors

    def _generator(self, purpose: str) -> torch.Generator:
        """Return the generator of the next random event; equal on every rank and after a resume."""
        event = self.memory.events
        self.memory.events += 1
        return generator_for(self.config.seed, self.path, event, purpose=purpose)

    def _require(self, rule: str) -> None:
        reason = self.why_not(rule)
        if reason is not None:
            raise PlasticityError(f"{rule} cannot act on {self.path!r}: {reason}")


def unit_run_of(state: BioModule) -> UnitRun:
    """Return a layer's next run of ``rejuvenate_units``, for several layers to do it together."""
    return UnitRun(state.turnover, state, lambda: state._generator("rejuvenate_units"))


def _divided(gradient: Tensor, factors: Tensor) -> Tensor:
    return gradient / torch.where(factors > 0, factors, 1.0).to(gradient.dtype)
