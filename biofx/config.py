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
from biofx.callables import callable_to_text, check_activation, identity
from biofx.errors import OptionError, SelectorError, suggest
from biofx.operators.distributions import CHANGING, GRANULARITIES, INDEPENDENT, Distribution
from biofx.operators.synapse_ops import INITIALISATIONS, SIGN_AXES, SIGN_METHODS
from biofx.select import Override, Selector, check_selector
from biofx.validate import (
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    Range,
    check_choice,
    check_flag,
    check_signs,
)

PARAMETERS = ("weights", "all")
"""Which parameters may have learning-rate factors."""
STORED_RATE_DTYPES = ("float32", "bfloat16")
"""What learning-rate factors may be stored as."""
FROM_SEED = "seed"
RATE_DTYPES = (*STORED_RATE_DTYPES, FROM_SEED)
"""The same, and ``"seed"``: not stored, but drawn again from the seed at each use."""
DALES_METHODS = (*SIGN_METHODS, "expand")

_OPTIONAL = ("base_lr", "rejuvenation_turnover", "dales_signs")
_RANGES: dict[str, Range] = {
    "fuzzy_learning_rate_factor_nu": FRACTION,
    "fuzzy_lr_min": FRACTION,
    "fuzzy_lr_max": Range(1),
    "fuzzy_lr_update_freq": Range(1, whole=True),
    "fuzzy_lr_decay": FRACTION,
    "dampening_factor": Range(0, 1, low_open=True),
    "crystal_thresh": POSITIVE,
    "crystal_min": FRACTION,
    "rejuvenation_parameter_dre": POSITIVE,
    "rejuvenation_turnover": Range(0, 1, low_open=True),
    "synaptic_scaling_rate": Range(0, 1, low_open=True),
    "weight_splitting_Gamma": COUNT,
    "base_lr": POSITIVE,
    "stability_factor": POSITIVE,
    "lr_variability": NOT_NEGATIVE,
    "dales_excitatory_fraction": FRACTION,
    "seed": SEED,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "fuzzy_lr_distribution": tuple(member.value for member in Distribution),
    "fuzzy_lr_granularity": GRANULARITIES,
    "fuzzy_lr_parameters": PARAMETERS,
    "dales_method": DALES_METHODS,
    "dales_initialisation": INITIALISATIONS,
    "dales_axis": SIGN_AXES,
}
_FLAGS = (
    *("fuzzy_lr_dynamic", "apply_dales_principle", "dales_constrain_inputs", "dales_constrain_readout"),
    "weight_splitting_fold",
)
_NOT_PER_LAYER = ("seed", "overrides")

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


@_refusing_unknown_fields
@dataclass(frozen=True, kw_only=True)
class BioConfig:
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

    fuzzy_learning_rate_factor_nu: float = 0.16
    """Spread of the learning-rate factors around 1, dimensionless, in [0, 1]."""
    fuzzy_lr_distribution: Distribution = Distribution.UNIFORM
    """Distribution of the factors; a member or its lower-case name."""
    fuzzy_lr_dynamic: bool = False
    """Whether the factors go on changing during training, for the distributions that can."""
    fuzzy_lr_min: float = 0.5
    """Lower bound of a factor, dimensionless, >= 0 and <= 1; draws below it are drawn again."""
    fuzzy_lr_max: float = 2.0
    """Upper bound of a factor, dimensionless, >= 1; draws above it are drawn again."""
    fuzzy_lr_update_freq: int = 100
    """Training steps between two changes of temporal factors, a count, >= 1."""
    fuzzy_lr_decay: float = 0.9995
    """Correlation of a temporal factor with its predecessor, dimensionless, in [0, 1]."""
    fuzzy_lr_granularity: str = "element"
    """What shares a factor: ``"element"`` (nothing), the synapses onto a ``"neuron"``, or the ``"layer"``."""
    fuzzy_lr_dtype: str = "float32"
    """What the factors are stored as: ``"float32"`` or ``"bfloat16"``; factors that go on changing need
    float32. With ``"seed"`` they are not stored: each backward draws those of float32 again, which nothing
    can change, from a distribution that depends neither on weights nor on time."""
    fuzzy_lr_parameters: str = "weights"
    """Which parameters have factors: ``"weights"`` of layers, look-ups and products, or ``"all"`` that are
    trained, so also biases, gains of normalisations and what is used directly (learned positions)."""
    dampening_factor: float = 0.6
    """What crystallization multiplies a caught synapse's factor by, dimensionless, in (0, 1]."""
    crystal_thresh: float = 4.5e-05
    """A synapse with |gradient| / |weight| below this is caught, > 0."""
    crystal_min: float = 0.01
    """Lowest factor that crystallization leads to, dimensionless, in [0, 1]."""
    rejuvenation_parameter_dre: float = 8.0
    """Protection of large weights from replacement, in standard deviations of the weights, > 0."""
    rejuvenation_turnover: float | None = None
    """Expected fraction of normally distributed weights to replace, in (0, 1]; instead of the above."""
    synaptic_scaling_rate: float = 0.1
    """How much of the way back to its total input strength a unit goes at once, dimensionless, in (0, 1]."""
    weight_splitting_Gamma: int = 0
    """Synapses per connection, a count; 0 and 1 are off."""
    weight_splitting_activation_function: Callable[[Any], Any] = identity
    """Applied to a layer's output before its groups are summed; any callable that keeps the shape, or the
    name of an element-wise one of torch's or of what :func:`biofx.register_activation` has registered."""
    weight_splitting_fold: bool = True
    """Whether the sums of weight splitting are folded into the weights where they can be: the same function
    for less work."""
    base_lr: float | None = 0.1
    """Volume-dependent plasticity: factor at zero weight, dimensionless, > 0; None for a mean factor of 1."""
    stability_factor: float = 2.0
    """Volume-dependent plasticity: how fast the factor falls with the weight, dimensionless, > 0."""
    lr_variability: float = 0.2
    """Volume-dependent plasticity: standard deviation of the multiplicative noise, dimensionless, >= 0."""
    apply_dales_principle: bool = False
    """Whether every unit is excitatory or inhibitory at all of its outgoing synapses."""
    dales_method: str = "project"
    """How a sign is enforced: ``"project"`` (wrong signs become 0), ``"abs"`` (they are mirrored), or
    ``"expand"`` (each unit becomes an excitatory and an inhibitory copy, and the model's function stays: for
    pretrained models)."""
    dales_initialisation: str = "balanced"
    """Weights to begin with under ``"project"`` and ``"abs"``: ``"balanced"`` makes them sparse, with as much
    excitation as inhibition at each unit; ``"keep"`` leaves them, which is right for trained weights."""
    dales_signs: tuple[int, ...] | None = None
    """The signs of a layer's outputs, +1 or -1 each, in an override for that layer; None to draw them."""
    dales_axis: str = "presynaptic"
    """Whose sign a weight carries; ``"postsynaptic"`` reproduces the reference package for comparison."""
    dales_excitatory_fraction: float = 0.5
    """Fraction of a layer's units (its outputs) that are excitatory, dimensionless, in [0, 1]; 0.8 is
    cortical."""
    dales_constrain_inputs: bool = False
    """Whether the model's inputs are units with a sign too."""
    dales_constrain_readout: bool = False
    """Whether the synapses onto the model's outputs are constrained too."""
    seed: int = 0
    """Seed of every random draw; equal seeds give equal models."""
    overrides: tuple[Override, ...] = ()
    """Options per selector, in order, the last one winning; added by :meth:`override`."""

    def __post_init__(self) -> None:
        for name in _field_names():
            if name != "overrides":
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

    def replace(self, **fields: Any) -> BioConfig:
        """Return a copy with some fields changed.

        Raises:
            OptionError: an unknown field, or a value out of range.
        """
        _refuse_unknown(fields)
        return dataclasses.replace(self, **fields)

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
        options = {name: getattr(self, name) for name in _field_names() if name != "overrides"}
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
        plain = {name: getattr(self, name) for name in _field_names() if name != "overrides"}
        plain["fuzzy_lr_distribution"] = self.fuzzy_lr_distribution.value
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
        table = self.to_dict()
        table["overrides"] = [_as_text(entry) for entry in table["overrides"]]
        toml.write(path, _as_text(table))


def check_rate_dtype(field: str, value: Any) -> str:
    """Return the value.

    Raises:
        OptionError: it is none of :data:`RATE_DTYPES`.
    """
    if isinstance(value, str) and value == "uint8":
        raise OptionError(
            f"{field}: expected one of {', '.join(RATE_DTYPES)}, found 'uint8', which was removed; 'seed' "
            "needs less memory than it did, and rules can change factors in 'bfloat16'"
        )
    return check_choice(field, value, RATE_DTYPES)


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
def _field_names() -> list[str]:
    return [entry.name for entry in dataclasses.fields(BioConfig)]


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


def _as_text(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields as TOML can carry them: callables by name, None as a word."""
    return {
        name: "none" if value is None else callable_to_text(value) if callable(value) else value
        for name, value in fields.items()
    }


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in _field_names():
            raise OptionError(f"unknown field {name!r}{suggest(str(name), _field_names())}")


def _checked_override(override: Override) -> Override:
    if not isinstance(override, Override):
        raise OptionError(
            f"overrides: expected Override records, found {override!r}; use config.override(...)"
        )
    selector, options = check_selector(override.selector), dict(override.options)
    _refuse_unknown(options)
    for name in options:
        if name in _NOT_PER_LAYER:
            raise OptionError(f"{name} holds for the whole model and cannot be overridden for {selector!r}")
    if not options:
        raise OptionError(f"override of {selector!r} changes nothing: expected at least one field=value")
    return Override(selector, tuple((name, _checked(name, value)) for name, value in options.items()))


def _checked(name: str, value: Any) -> Any:
    """Return ``value`` in the field's own type, or raise one error that names field, value and range."""
    if name in _OPTIONAL and (value is None or value == "none"):
        return None
    if name in _RANGES:
        return _RANGES[name].check(name, value)
    if name == "fuzzy_lr_dtype":
        return check_rate_dtype(name, value)
    if name in _CHOICES:
        text = check_choice(name, value, _CHOICES[name])
        return Distribution(text) if name == "fuzzy_lr_distribution" else text
    if name in _FLAGS:
        return check_flag(name, value)
    if name == "dales_signs":
        return check_signs(name, value)
    return check_activation(name, value)
