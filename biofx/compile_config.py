"""From what a user asks for to the passes that do it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from biofx.config import BioConfig, Distribution
from biofx.errors import OptionError, PipelineError, suggest
from biofx.pass_base import Pass
from biofx.passes import ConstrainSigns, ScaleGradients, SplitWeights
from biofx.pipeline import Pipeline
from biofx.plasticity.distributions import STATIC_DISTRIBUTIONS
from biofx.select import Override

PassChoice: TypeAlias = str | Pass | Sequence[str | Pass]

_OPTIONS: dict[type[Pass], dict[str, str]] = {
    SplitWeights: {
        "weight_splitting_Gamma": "gamma",
        "weight_splitting_activation_function": "activation",
    },
    ConstrainSigns: {
        "apply_dales_principle": "enabled",
        "dales_method": "method",
        "dales_axis": "axis",
        "dales_excitatory_fraction": "excitatory_fraction",
        "dales_constrain_inputs": "constrain_inputs",
        "dales_constrain_readout": "constrain_readout",
        "seed": "seed",
    },
    ScaleGradients: {
        "fuzzy_learning_rate_factor_nu": "nu",
        "fuzzy_lr_distribution": "distribution",
        "fuzzy_lr_min": "low",
        "fuzzy_lr_max": "high",
        "seed": "seed",
    },
}
"""For each pass the config fields it reads, and what it calls them."""

_IS_OFF: dict[type[Pass], Callable[[dict[str, Any]], bool]] = {
    SplitWeights: lambda fields: fields["weight_splitting_Gamma"] < 2,
    ConstrainSigns: lambda fields: not fields["apply_dales_principle"],
    ScaleGradients: lambda fields: (
        fields["fuzzy_lr_distribution"] is Distribution.BASELINE
        or fields["fuzzy_learning_rate_factor_nu"] == 0
    ),
}


def compile_config(config: BioConfig, names: Iterable[str] | None = None) -> Pipeline:
    """Return the pipeline that does what a config asks for.

    Args:
        config: the options. A mechanism that is off everywhere contributes no pass.
        names: keep only the passes of these names.

    Raises:
        OptionError: the config asks for factors that change during training.
        PipelineError: one of ``names`` is no pass of a config, or is switched off in this one.
    """
    wanted = None if names is None else list(names)
    known = {cls.name: cls for cls in _OPTIONS}
    for name in wanted or ():
        if name not in known:
            raise PipelineError(f"a config has no options for pass {name!r}{suggest(name, known)}")
        if _is_off(known[name], config):
            fields = ", ".join(field for field in _OPTIONS[known[name]] if field != "seed")
            raise PipelineError(f"pass {name!r} is asked for, but this config switches it off; see {fields}")
    chosen = [cls for cls in _OPTIONS if not _is_off(cls, config) and (wanted is None or cls.name in wanted)]
    return Pipeline(tuple(_configured(cls, config) for cls in chosen))


def choose_passes(choice: PassChoice | None, config: BioConfig | None) -> Pipeline:
    """Return the pipeline for ``transform``: the config's, or what ``choice`` names.

    In ``choice`` a pass, or a text with options, stands for itself; a bare name takes its options from
    the config, if there is one.

    Raises:
        PipelineError: malformed text, an unknown pass, one that the config switches off.
    """
    if choice is None:
        return compile_config(config if config is not None else BioConfig())
    if isinstance(choice, Pipeline):
        return choice
    passes: list[Pass] = []
    for entry in (choice,) if isinstance(choice, (str, Pass)) else choice:
        if isinstance(entry, Pass):
            passes.append(entry)
            continue
        parsed = Pipeline.parse(entry)
        for member in parsed.passes:
            bare = config is not None and str(member) == member.name and member.name in entry.split(",")
            passes += (
                compile_config(config, [member.name]).passes if bare and config is not None else (member,)
            )
    return Pipeline(tuple(passes))


def _is_off(cls: type[Pass], config: BioConfig) -> bool:
    base = config.options_for([])
    layers = [base, *({**base, **dict(override.options)} for override in config.overrides)]
    return all(_IS_OFF[cls](fields) for fields in layers)


def _configured(cls: type[Pass], config: BioConfig) -> Pass:
    names = _OPTIONS[cls]
    overrides = []
    for override in config.overrides:
        options = {names[field]: value for field, value in override.options if field in names}
        if options:
            overrides.append(Override(override.selector, tuple(options.items())))
        _refuse_dynamic({**config.options_for([]), **dict(override.options)})
    _refuse_dynamic(config.options_for([]))
    base = {option: getattr(config, field) for field, option in names.items()}
    return cls.from_options({**base, "overrides": tuple(overrides)})


def _refuse_dynamic(fields: dict[str, Any]) -> None:
    distribution = fields["fuzzy_lr_distribution"]
    if distribution not in STATIC_DISTRIBUTIONS:
        raise OptionError(
            f"fuzzy_lr_distribution: {distribution.value!r} factors change during training, which the graph "
            f"alone does not do; choose one that is drawn once: "
            f"{', '.join(member.value for member in STATIC_DISTRIBUTIONS)}"
        )
    if distribution is Distribution.WEIGHT_ADAPTIVE and fields["fuzzy_lr_dynamic"]:
        raise OptionError(
            "fuzzy_lr_dynamic: weight-adaptive factors that follow the weights during training are not done "
            "by the graph alone; set fuzzy_lr_dynamic=False to draw them once from the weights as they are"
        )
