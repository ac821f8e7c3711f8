"""What a user asks for: one frozen, validated record of options."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from biofx import toml
from biofx.callables import callable_to_text, identity
from biofx.consolidation_options import ConsolidationOptions
from biofx.errors import OptionError, SelectorError, suggest
from biofx.operators.mask_ops import GROWTHS, MASK_INITIALISATIONS
from biofx.operators.rate_sampling import CHANGING, GRANULARITIES, INDEPENDENT, Distribution
from biofx.operators.sign_ops import INITIALISATIONS, SIGN_AXES, SIGN_METHODS
from biofx.operators.split_ops import SPLITTING_MODES, SPLITTING_RATES
from biofx.options import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    Activation,
    AtRule,
    Choice,
    Feeds,
    Flag,
    Fractions,
    MaskRows,
    Option,
    OrNone,
    Range,
    Signs,
    Sizes,
    decided_at_transform,
    declared_options,
    option,
    with_documented_options,
)
from biofx.select import Override, Selector, check_selector
from biofx.shown_config import config_html, config_repr

SELECTIONS = ("probability", "proportion", "threshold")
"""Values of ``rejuvenation_selection``."""
UNIT_TURNOVERS = ("off", "continual-backprop", "redo")
"""Values of ``unit_turnover``."""
STORED_RATE_DTYPES = ("float32", "bfloat16")
"""What learning-rate factors may be stored as."""
_DRAWING_AGAIN = ("rejuvenate_weights", "rejuvenate_units", "shrink_and_perturb")
FROM_SEED = "seed"
RATE_DTYPES = (*STORED_RATE_DTYPES, FROM_SEED)
"""The same, and ``"seed"``: not stored, but drawn again from the seed at each use."""
RATE_DTYPE = Choice(
    RATE_DTYPES, {"uint8": "'seed' needs less memory than it did, and rules can change factors in 'bfloat16'"}
)

ConfigT = TypeVar("ConfigT", bound="BioConfig")


def _refusing_unknown_fields(cls: type[ConfigT]) -> type[ConfigT]:
    """Let the constructor name the nearest field where Python would only say that there is none."""
    constructor = cls.__init__

    @functools.wraps(constructor)
    def checked(self: ConfigT, *args: Any, **fields: Any) -> None:
        _refuse_unknown(fields)
        constructor(self, *args, **fields)

    cls.__init__ = checked  # type: ignore[assignment, method-assign]
    return cls


@with_documented_options
@_refusing_unknown_fields
@dataclass(frozen=True, kw_only=True)
class BioConfig(ConsolidationOptions):
    """Every option of every mechanism, with the user guide's names and the reference package's defaults.

    A mechanism is off by default where its paper calls it optional: ``weight_splitting_Gamma`` of 0 or 1,
    ``apply_dales_principle=False`` and ``Distribution.BASELINE`` each switch one off. The record is frozen;
    :meth:`replace` and :meth:`override` return new ones.

    Raises:
        OptionError: at construction, naming the field, the value found and the range expected.

    >>> config = BioConfig(weight_splitting_Gamma=2).override("layer4.*", weight_splitting_Gamma=4)
    >>> config.options_for(["layer4.*"])["weight_splitting_Gamma"]
    4
    """

    fuzzy_learning_rate_factor_nu: float = option(
        0.16,
        FRACTION,
        "Spread of the learning-rate factors around 1, dimensionless.",
        feeds={"scale-gradients": "nu"},
        off={"scale-gradients": lambda nu: nu == 0},
        rules={"update_fuzzy_learning_rates": decided_at_transform("nu")},
    )
    fuzzy_lr_distribution: Distribution = option(
        Distribution.UNIFORM,
        Choice(tuple(Distribution)),
        """Distribution of the factors. One that changes begins with a draw, and rules change it from there.
        ``"log_uniform"`` has bounds (``fuzzy_lr_log_min``, ``fuzzy_lr_log_max``) in place of a spread.""",
        feeds={
            "scale-gradients": "distribution",
            "observe-activity": Feeds("enabled", lambda given: given is Distribution.ACTIVITY),
        },
        off={
            "scale-gradients": lambda given: given is Distribution.BASELINE,
            "observe-activity": lambda given: given is not Distribution.ACTIVITY,
        },
    )
    fuzzy_lr_dynamic: bool = option(
        False,
        Flag(),
        "Whether the factors go on changing during training, for the distributions that can.",
        off={"observe-activity": lambda dynamic: not dynamic},
    )
    fuzzy_lr_min: float = option(
        0.5,
        FRACTION,
        "Lower bound of a factor, dimensionless; a draw below it is drawn again.",
        feeds={"scale-gradients": "low"},
        rules={"update_fuzzy_learning_rates": decided_at_transform("low")},
    )
    fuzzy_lr_max: float = option(
        2.0,
        Range(1),
        "Upper bound of a factor, dimensionless; a draw above it is drawn again.",
        feeds={"scale-gradients": "high"},
        rules={"update_fuzzy_learning_rates": decided_at_transform("high")},
    )
    fuzzy_lr_log_min: float = option(
        1e-3,
        SHARE,
        "The same for log-uniform factors, which spread over decades between the bounds, dimensionless.",
        feeds={"scale-gradients": "log_low"},
    )
    fuzzy_lr_log_max: float = option(
        10.0,
        Range(1),
        """Upper bound of log-uniform factors, dimensionless. Their mean is (max - min) / ln(max / min), 1.086
        by default, and is not brought to 1.""",
        feeds={"scale-gradients": "log_high"},
    )
    fuzzy_lr_update_freq: int = option(
        100,
        Range(1, whole=True),
        "Training steps between two changes of temporal factors, a count.",
        rules={"update_fuzzy_learning_rates": "update_freq"},
    )
    fuzzy_lr_decay: float = option(
        0.9995,
        FRACTION,
        "Correlation of a temporal factor with its predecessor, dimensionless.",
        rules={"update_fuzzy_learning_rates": "decay"},
    )
    fuzzy_lr_granularity: str = option(
        "element",
        Choice(GRANULARITIES),
        """What shares a factor: ``"element"`` (nothing), the synapses onto a ``"neuron"``, or the
        ``"layer"``.""",
        feeds={"scale-gradients": "granularity"},
    )
    fuzzy_lr_dtype: str = option(
        "float32",
        RATE_DTYPE,
        """What the factors are stored as; factors that go on changing need ``"float32"``. With ``"seed"``
        they are not stored: each backward draws those of float32 again, which nothing can change, from a
        distribution that depends on neither weights nor time.""",
        feeds={"scale-gradients": "dtype"},
    )
    fuzzy_lr_parameters: str = option(
        "weights",
        Choice(("weights", "all")),
        """Which parameters have factors: ``"weights"`` of layers, look-ups and products, or ``"all"``
        trainable ones that the graph reads, so also biases, gains of normalisations and parameters that are
        used directly, such as learned positions.""",
        feeds={"scale-gradients": "parameters"},
    )
    dampening_factor: float = option(
        0.6,
        SHARE,
        "What crystallization multiplies a caught synapse's factor by, dimensionless.",
        rules={"crystallize": "dampening"},
    )
    crystal_thresh: float = option(
        4.5e-05,
        POSITIVE,
        "Crystallization catches a synapse with abs(gradient) / abs(weight) below this.",
        rules={"crystallize": "threshold"},
    )
    crystal_min: float = option(
        0.01,
        FRACTION,
        "Lowest factor that crystallization leads to, dimensionless.",
        rules={"crystallize": decided_at_transform("floor")},
    )
    rejuvenation_parameter_dre: float = option(
        8.0,
        POSITIVE,
        "Protection of large weights from replacement, in standard deviations of the weights.",
        rules={"rejuvenate_weights": "protection"},
    )
    rejuvenation_turnover: float | None = option(
        None,
        OrNone(SHARE),
        """Expected fraction of normally distributed weights to replace, instead of
        ``rejuvenation_parameter_dre``; by utility, of the weights as they are. Those of utility 0 all go. For
        ``rejuvenation_selection="proportion"`` it is exact.""",
        rules={"rejuvenate_weights": "turnover"},
    )
    rejuvenation_selection: str = option(
        "probability",
        Choice(SELECTIONS),
        """Which weights are replaced: each with a ``"probability"`` that falls with what protects it, the
        ``"proportion"`` ``rejuvenation_turnover`` of those least protected, where fractions of a weight are
        carried over, or all below a ``"threshold"``, ``rejuvenation_threshold``. Those with a learning-rate
        factor of 0 never are.""",
        rules={"rejuvenate_weights": decided_at_transform("selection", lambda given: given == "proportion")},
    )
    rejuvenation_threshold: float | None = option(
        None,
        OrNone(FRACTION),
        """For ``rejuvenation_selection="threshold"``: weights are replaced whose utility, or magnitude, is at
        most this fraction of its mean over the weight, dimensionless.""",
        rules={"rejuvenate_weights": "threshold"},
    )
    rejuvenation_utility: str = option(
        "magnitude",
        Choice(("magnitude", "gradient")),
        """What protects a weight from replacement: its ``"magnitude"``, or by ``"gradient"`` the running mean
        of abs(weight · gradient), a buffer as large as the weight, which :func:`biofx.attach` updates at each
        step. Magnitudes protect the weights of dead units, which may be large: by magnitude, rejuvenation
        does not prevent loss of plasticity.""",
        rules={"rejuvenate_weights": decided_at_transform("utility")},
    )
    rejuvenation_utility_decay: float = option(
        0.99,
        FRACTION,
        """Share of the earlier mean that the utility keeps when a gradient is taken into it, dimensionless;
        with 0 it is that of the step at which weights are replaced.""",
        rules={"rejuvenate_weights": AtRule("utility_decay", lasts=True)},
    )
    rejuvenation_utility_every: int = option(
        1,
        Range(1, whole=True),
        """Optimizer steps from one gradient that is taken into the utility to the next, a count. Each costs a
        pass over the weight.""",
        rules={"rejuvenate_weights": AtRule("utility_every", lasts=True)},
    )
    rejuvenation_redraw: str = option(
        "survivors",
        Choice(("survivors", "initial", "zero")),
        """What the weights of new synapses are: of magnitudes as the ``"survivors"`` have, drawn from the
        ``"initial"`` distribution (``initial_distribution``), or ``"zero"``.""",
        rules={"rejuvenate_weights": "redraw"},
    )
    rejuvenation_growth: str = option(
        "random",
        Choice(GROWTHS),
        """Where connections of a masked weight grow when weak ones vanish: at ``"random"`` (SET), or where
        the ``"gradient"`` is largest (RigL), with the sign that descends it.""",
        feeds={"mask-weights": "growth"},
        rules={"rejuvenate_weights": decided_at_transform("growth")},
    )
    initial_distribution: str = option(
        "torch",
        Choice(("torch", "normal", "uniform")),
        """What weights are drawn from at the start, for rules that draw from it again: ``"torch"``, as torch
        initialises layers of that kind, or with a standard deviation of ``initial_gain`` / √inputs. It is not
        read off the weights.""",
        rules=dict.fromkeys(_DRAWING_AGAIN, decided_at_transform("initial_distribution")),
    )
    initial_gain: float = option(
        1.0,
        POSITIVE,
        """Standard deviation of normal or uniform initial weights times √(inputs of a unit), dimensionless:
        √2 is He's, 1 LeCun's.""",
        rules=dict.fromkeys(_DRAWING_AGAIN, decided_at_transform("initial_gain")),
    )
    shrink_factor: float = option(
        0.9999,
        SHARE,
        "What ``shrink_and_perturb`` multiplies weights by, dimensionless.",
        rules={"shrink_and_perturb": "factor"},
    )
    shrink_perturbation: float = option(
        0.01,
        NOT_NEGATIVE,
        "How much of a draw of the initial distribution ``shrink_and_perturb`` adds, dimensionless.",
        rules={"shrink_and_perturb": "perturbation"},
    )
    unit_turnover: str = option(
        "off",
        Choice(UNIT_TURNOVERS),
        """Which units ``rejuvenate_units`` replaces: none (``"off"``), those of lowest utility
        (``"continual-backprop"``, Dohare et al. 2024), or dormant ones (``"redo"``, Sokar et al. 2023).""",
        feeds={"watch-units": Feeds("enabled", lambda given: given != "off")},
        off={"watch-units": lambda given: given == "off"},
        rules={"rejuvenate_units": decided_at_transform("turnover", lambda given: given == "off")},
    )
    unit_turnover_rate: float = option(
        1e-4,
        FRACTION,
        """Continual backprop: fraction of the mature units that each run of ``rejuvenate_units`` replaces;
        what is left of a unit is carried over.""",
        rules={"rejuvenate_units": "rate"},
    )
    unit_turnover_maturity: int = option(
        100,
        COUNT,
        "Continual backprop: runs of ``rejuvenate_units`` that a new unit is safe from replacement, a count.",
        rules={"rejuvenate_units": "maturity"},
    )
    unit_turnover_dormancy: float = option(
        0.1,
        FRACTION,
        """ReDo: τ, a unit is dormant whose mean magnitude of activity is at most this fraction of the mean of
        all units of its layer.""",
        rules={"rejuvenate_units": "dormancy"},
    )
    synaptic_scaling_rate: float = option(
        0.1,
        SHARE,
        "How much of the way back to its total input strength a unit goes at once, dimensionless.",
        rules={"synaptic_scaling": "rate"},
    )
    weight_splitting_Gamma: int = option(
        0,
        COUNT,
        "Synapses per connection, a count; 0 and 1 are off.",
        feeds={"split-weights": "gamma"},
        off={"split-weights": lambda gamma: gamma < 2, "fold-splits": lambda gamma: gamma < 2},
    )
    weight_splitting_activation_function: Callable[[Any], Any] = option(
        identity,
        Activation(),
        """Applied to each synapse's output before the sum, of sub-weights without the bias, which is added to
        the sum; keeps the shape. A text names an element-wise
        function of torch's, or one that :func:`biofx.register_activation` has registered.""",
        feeds={"split-weights": "activation"},
    )
    weight_splitting_mode: str = option(
        "neighbours",
        Choice(SPLITTING_MODES),
        """What the synapses of a connection are: ``"neighbours"``, groups of Γ output channels, of which each
        carries the sum on, or ``"sub-weights"``, Γ weights whose sum is the layer's weight.""",
        feeds={"split-weights": "mode"},
        off={"fold-splits": lambda mode: mode == "sub-weights"},
    )
    weight_splitting_rates: str = option(
        "sum",
        Choice(SPLITTING_RATES),
        """How large a step synapses take together: ``"sum"``, each takes the whole step, so Γ of them take Γ
        times the step of the weight that they add up to, or ``"mean"``, each gradient is divided by their
        number, so that their sum takes that weight's step.""",
        feeds={"split-weights": "rates"},
    )
    weight_splitting_fold: bool = option(
        True,
        Flag(),
        """Whether the sums of weight splitting are folded into the weights where they can be: the same
        function for less work.""",
        feeds={"fold-splits": "enabled"},
        off={"fold-splits": lambda folded: not folded},
    )
    base_lr: float | None = option(
        0.1,
        OrNone(POSITIVE),
        "Volume-dependent plasticity: factor at zero weight, dimensionless; None for a mean factor of 1.",
        rules={"volume_dependent_lr": "base"},
    )
    stability_factor: float = option(
        2.0,
        POSITIVE,
        "Volume-dependent plasticity: how fast the factor falls with the weight, dimensionless.",
        rules={"volume_dependent_lr": "stability"},
    )
    lr_variability: float = option(
        0.2,
        NOT_NEGATIVE,
        "Volume-dependent plasticity: standard deviation of the multiplicative noise, dimensionless.",
        rules={"volume_dependent_lr": "variability"},
    )
    apply_dales_principle: bool = option(
        False,
        Flag(),
        "Whether every unit is excitatory or inhibitory at all of its outgoing synapses.",
        feeds={"constrain-signs": "enabled"},
        off={
            "constrain-signs": lambda applied: not applied,
            "expand-units": lambda applied: not applied,
        },
    )
    dales_method: str = option(
        "project",
        Choice((*SIGN_METHODS, "expand")),
        """How a sign is enforced: ``"project"`` (wrong signs become 0 and may come back), ``"abs"`` (they
        are mirrored), or ``"expand"`` (each unit becomes an excitatory and an inhibitory copy, which keep
        the model's function and are then projected: for pretrained models).""",
        feeds={
            "expand-units": Feeds("enabled", lambda method: method == "expand"),
            "constrain-signs": "method",
        },
        off={"expand-units": lambda method: method != "expand"},
    )
    dales_initialisation: str = option(
        "balanced",
        Choice(INITIALISATIONS),
        """Weights to begin with under ``"project"`` and ``"abs"``: ``"balanced"`` makes them sparse, with as
        much excitation as inhibition at each unit, which keeps deep networks alive; ``"keep"`` leaves them,
        which is right for trained weights. Balanced weights that looked trained are warned of.""",
        feeds={"constrain-signs": "initialisation"},
    )
    dales_signs: tuple[int, ...] | None = option(
        None,
        OrNone(Signs()),
        "The signs of a layer's outputs, in an override for that layer; None to draw them.",
        feeds={"constrain-signs": "signs"},
    )
    dales_axis: str = option(
        "presynaptic",
        Choice(SIGN_AXES),
        """Whose sign a weight carries; ``"postsynaptic"`` signs rows, and kernels of convolutions, as the
        reference package does, for comparison only.""",
        feeds={"constrain-signs": "axis"},
    )
    dales_excitatory_fraction: float = option(
        0.5,
        FRACTION,
        """Fraction of a layer's units (its outputs) that are excitatory, dimensionless, rounded to whole
        units; 0.8 is cortical.""",
        feeds={"constrain-signs": "excitatory_fraction"},
    )
    dales_constrain_inputs: bool = option(
        False,
        Flag(),
        "Whether the model's inputs are units with a sign too.",
        feeds={"constrain-signs": "constrain_inputs"},
    )
    dales_constrain_readout: bool = option(
        False,
        Flag(),
        "Whether the synapses onto the model's outputs are constrained too.",
        feeds={"constrain-signs": "constrain_readout", "expand-units": "constrain_readout"},
    )
    weight_density: float = option(
        1.0,
        SHARE,
        """Fraction of the connections between units that exist, dimensionless; 1 is off. Where a mask or
        blocks allow fewer, it is a fraction of those.""",
        feeds={"mask-weights": "density"},
        on={"mask-weights": lambda density: density < 1},
    )
    weight_mask_self_connections: bool = option(
        True,
        Flag(),
        "Whether a unit of a recurrent layer may connect to itself.",
        feeds={"mask-weights": "self_connections"},
        on={"mask-weights": lambda allowed: not allowed},
    )
    weight_mask_blocks: tuple[tuple[float, ...], ...] | None = option(
        None,
        OrNone(Fractions()),
        """Density of the connections between areas, dimensionless: a row for each postsynaptic area, in it
        an entry for each presynaptic one; 0 where none may ever exist. Multiplied by ``weight_density``.""",
        feeds={"mask-weights": "blocks"},
        on={"mask-weights": lambda blocks: blocks is not None},
    )
    weight_mask_areas: tuple[Any, ...] | None = option(
        None,
        OrNone(Sizes()),
        """Units of each area, counts, for ``weight_mask_blocks``: one list where inputs and outputs have the
        same areas, or a list for the outputs and one for the inputs; None for areas of equal size.""",
        feeds={"mask-weights": "areas"},
    )
    weight_mask: str | None = option(
        None,
        OrNone(MaskRows()),
        """Which connections of a layer may exist, in an override for that layer: 1 or 0 for each input
        channel of each output, or for each element of the weight, in rows as the weight has them.""",
        feeds={"mask-weights": "mask"},
        on={"mask-weights": lambda mask: mask is not None},
    )
    weight_mask_initialisation: str = option(
        "rescale",
        Choice(MASK_INITIALISATIONS),
        """Weights to begin with where some are masked: ``"rescale"`` multiplies those of a unit by
        1 / √(fraction that exists), which keeps the variance of its input; ``"keep"`` leaves them, which is
        right for trained weights.""",
        feeds={"mask-weights": "initialisation"},
    )
    seed: int = option(
        0,
        SEED,
        "Seed of every random draw; equal seeds give equal models.",
        feeds=dict.fromkeys(("split-weights", "mask-weights", "constrain-signs", "scale-gradients"), "seed"),
        per_layer=False,
    )
    overrides: tuple[Override, ...] = ()
    """Options per selector, in order, the last one winning; added by :meth:`override`."""

    def __post_init__(self) -> None:
        for name in config_options():
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        if not isinstance(self.overrides, (list, tuple)):
            raise OptionError(f"overrides: expected a list of Override records, found {self.overrides!r}")
        object.__setattr__(self, "overrides", tuple(map(_checked_override, self.overrides)))
        if (
            self.fuzzy_lr_dtype != "float32"
            and self.fuzzy_lr_dynamic
            and self.fuzzy_lr_distribution in CHANGING
        ):
            raise OptionError(
                "fuzzy_lr_dtype: expected 'float32' for factors that go on changing (fuzzy_lr_dynamic=True, "
                f"{self.fuzzy_lr_distribution.value}), found {self.fuzzy_lr_dtype!r}, which rounds their "
                "small steps away"
            )
        if self.fuzzy_lr_dtype == FROM_SEED:
            check_drawn_again("fuzzy_lr_dtype", self.fuzzy_lr_distribution)
        self._check_selection()
        self.check_consolidation()

    def _check_selection(self) -> None:
        """Check that how weights are selected has its amount, and no other that would have no effect."""
        selection, turnover = self.rejuvenation_selection, self.rejuvenation_turnover
        threshold = self.rejuvenation_threshold
        if selection == "proportion" and turnover is None:
            raise OptionError(
                "rejuvenation_turnover: expected a fraction for rejuvenation_selection='proportion', found "
                "None; give how much is replaced at once"
            )
        if selection == "threshold" and threshold is None:
            raise OptionError(
                "rejuvenation_threshold: expected a fraction of the mean for "
                "rejuvenation_selection='threshold', found None; give below what weights are replaced"
            )
        unread = turnover if selection == "threshold" else threshold
        if unread is not None:
            name = "rejuvenation_turnover" if selection == "threshold" else "rejuvenation_threshold"
            raise OptionError(
                f"{name}: expected None for rejuvenation_selection={selection!r}, which does not read it, "
                f"found {unread!r}"
            )

    def __repr__(self) -> str:
        return config_repr(self)

    def _repr_html_(self) -> str:
        return config_html(self)

    @property
    def fuzzy_lr_bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the factors of the distribution, dimensionless."""
        if self.fuzzy_lr_distribution is Distribution.LOG_UNIFORM:
            return self.fuzzy_lr_log_min, self.fuzzy_lr_log_max
        return self.fuzzy_lr_min, self.fuzzy_lr_max

    def replace(self, **fields: Any) -> BioConfig:
        """Return a copy with some fields changed, the config itself where none is.

        Raises:
            OptionError: an unknown field, or a value out of range.
        """
        _refuse_unknown(fields)
        changed = {name: value for name, value in fields.items() if not _is_same(getattr(self, name), value)}
        return dataclasses.replace(self, **changed) if changed else self

    def override(self, selector: Selector, **options: Any) -> BioConfig:
        """Return a copy in which ``options`` hold for the layers that ``selector`` picks.

        Overrides apply in the order given, and the last one wins. A selector that matches nothing in the
        model is an error when the config is applied.

        Args:
            selector: see :mod:`biofx.select`.
            **options: fields of this config, except ``seed`` and ``overrides``.

        Raises:
            OptionError: no option, an unknown one, one that cannot differ between layers, a bad value.
            SelectorError: ``selector`` is not a selector.
        """
        added = Override(selector, tuple(options.items()))
        return dataclasses.replace(self, overrides=(*self.overrides, added))

    def options_for(self, selectors: list[Selector]) -> dict[str, Any]:
        """Return the fields as they stand where exactly the overrides with these selectors match."""
        asked = [check_selector(selector) for selector in selectors]
        options = {name: getattr(self, name) for name in config_options()}
        for override in self.overrides:
            if override.selector in asked:
                options.update(override.options)
        return options

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> BioConfig:
        """Build a config from plain values, as :meth:`to_dict` and a TOML file give them.

        Raises:
            OptionError: not a mapping, an unknown key (the nearest ones are named), a bad value.
        """
        if not isinstance(options, Mapping):
            raise OptionError(f"expected a mapping of field names to values, found {type(options).__name__}")
        _refuse_unknown(options)
        fields = dict(options)
        overrides = fields.pop("overrides", ())
        if not isinstance(overrides, (list, tuple)):
            raise OptionError(f"overrides: expected a list of tables, found {overrides!r}")
        added = []
        for entry in overrides:
            if not isinstance(entry, Mapping) or "selector" not in entry:
                raise OptionError(f"overrides: expected tables with a 'selector' key, found {entry!r}")
            changed = tuple((name, value) for name, value in entry.items() if name != "selector")
            added.append(Override(entry["selector"], changed))
        try:
            return cls(**fields, overrides=tuple(added))
        except SelectorError as error:
            raise OptionError(f"overrides: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values; callables stay callables."""
        plain: dict[str, Any] = {name: _plain(getattr(self, name)) for name in config_options()}
        plain["overrides"] = [
            {"selector": override.selector, **{name: _plain(value) for name, value in override.options}}
            for override in self.overrides
        ]
        return plain

    @classmethod
    def from_toml(cls, path: str | Path) -> BioConfig:
        """Read a config from a TOML file.

        Raises:
            OptionError: the file cannot be read, is not TOML, or holds an unknown key or a bad value.
        """
        try:
            return cls.from_dict(toml.read(path))
        except OptionError as error:
            raise OptionError(f"{path}: {error}") from error

    def to_toml(self, path: str | Path) -> None:
        """Write the config to a TOML file, whole or not at all.

        Raises:
            OptionError: a value that a text cannot carry (a lambda, a selector that is a predicate).
        """
        toml.write(path, self.to_plain_text())

    def to_plain_text(self) -> dict[str, Any]:
        """Return the fields as a text file carries them: callables by name, None as a word.

        Raises:
            OptionError: as for :meth:`to_toml`.
        """
        table = self.to_dict()
        table["overrides"] = [_as_text(entry) for entry in table["overrides"]]
        return _as_text(table)


def check_drawn_again(field: str, distribution: Distribution) -> None:
    """Check that factors of a distribution can be drawn again from their seed.

    Raises:
        OptionError: they depend on more than that.
    """
    if distribution not in INDEPENDENT:
        raise OptionError(
            f"{field}: expected 'float32' for factors that depend on weights, activity or time "
            f"({distribution.value}), found {FROM_SEED!r}, which draws them again at each use; store them, "
            f"or take one of {', '.join(member.value for member in INDEPENDENT)}"
        )


@functools.cache
def config_options() -> dict[str, Option]:
    """Return what each field of a config but ``overrides`` declares, by name."""
    return declared_options(BioConfig)


def rule_options(rule: str) -> dict[str, str]:
    """Return what an entry of a schedule may give a rule: the rule's names of options, and their fields.

    >>> rule_options("synaptic_scaling")
    {'rate': 'synaptic_scaling_rate'}
    """
    options = config_options().items()
    return {declared.rules[rule].option: field for field, declared in options if rule in declared.rules}


def option_from_config(field: str, **changed: Any) -> Any:
    """Return the field of a pass that means what a field of the config means.

    Args:
        field: of the config.
        **changed: what differs in the pass: ``default``, ``doc``.
    """
    declared = config_options()[field]
    default = next(entry.default for entry in dataclasses.fields(BioConfig) if entry.name == field)
    shown = changed.get("doc", declared.doc)
    return option(changed.get("default", default), declared.permitted, shown, field=field)


def _is_same(value: Any, other: Any) -> bool:
    """Whether two values are one, or equal numbers or words of one type."""
    alike = type(value) is type(other) and type(value) in (bool, int, float, str)
    return value is other or (alike and value == other)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _as_text(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields as TOML can carry them: callables by name, None as a word."""
    return {
        name: "none" if value is None else callable_to_text(value) if callable(value) else value
        for name, value in fields.items()
    }


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    known = [*config_options(), "overrides"]
    for name in options:
        if name not in known:
            raise OptionError(f"unknown field {name!r}{suggest(str(name), known)}")


def _checked_override(override: Override) -> Override:
    if not isinstance(override, Override):
        raise OptionError(
            f"overrides: expected Override records, found {override!r}; use config.override(...)"
        )
    selector, options = check_selector(override.selector), dict(override.options)
    _refuse_unknown(options)
    for name in options:
        if name not in config_options() or not config_options()[name].per_layer:
            raise OptionError(f"{name} holds for the whole model and cannot be overridden for {selector!r}")
    if not options:
        raise OptionError(f"override of {selector!r} changes nothing: expected at least one field=value")
    return Override(selector, tuple((name, _checked(name, value)) for name, value in options.items()))


def _checked(name: str, value: Any) -> Any:
    return config_options()[name].permitted.check(name, value)
