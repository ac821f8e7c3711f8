"""From what a user asks for to the passes that do it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import EllipsisType
from typing import Any, TypeAlias

from biofx.config import BioConfig, config_options
from biofx.errors import OptionError, PipelineError, suggest
from biofx.layers.weight_site import Sites
from biofx.model.graph_module import BioGraphModule
from biofx.options import Feeds
from biofx.plasticity.bio_state import rule_config
from biofx.plasticity.model_states import bio_modules, is_taken, state_of
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.pipeline import Pipeline
from biofx.rewriting.registry import built_in_passes
from biofx.select import NodeIndex, Override, picks

PassChoice: TypeAlias = str | Pass | Sequence[str | Pass | EllipsisType]


def compile_config(config: BioConfig, names: Iterable[str] | None = None) -> Pipeline:
    """Return the pipeline that does what a config asks for.

    Args:
        config: the options. A mechanism that is off everywhere contributes no pass.
        names: keep only the passes of these names.

    Raises:
        PipelineError: one of ``names`` is no pass of a config, or is switched off in this one.
        OptionError: it gives signs and constrains none, or areas and masks nothing.
    """
    wanted = None if names is None else list(names)
    known = _configurable()
    for name in wanted or ():
        if name not in known:
            raise PipelineError(f"a config has no options for pass {name!r}{suggest(name, known)}")
        if _is_off(name, config):
            fields = ", ".join(field for field in _read_by(name) if field != "seed")
            raise PipelineError(f"pass {name!r} is asked for, but this config switches it off; see {fields}")
    chosen = [name for name in known if not _is_off(name, config) and (wanted is None or name in wanted)]
    if wanted is None and "constrain-signs" not in chosen:
        _refuse_signs(config)
    if wanted is None and "mask-weights" not in chosen:
        _refuse_areas(config)
    return Pipeline(tuple(_configured(known[name], config) for name in chosen))


def _configurable() -> dict[str, type[Pass]]:
    """Return the passes that a config has options for, which are all our own, by name."""
    fed = {name for declared in config_options().values() for name in declared.feeds}
    return {name: cls for name, cls in built_in_passes().items() if name in fed}


def _read_by(name: str) -> dict[str, Feeds]:
    """Return the fields of a config that a pass reads, and what they mean to it."""
    options = config_options()
    return {field: declared.feeds[name] for field, declared in options.items() if name in declared.feeds}


def _refuse_signs(config: BioConfig) -> None:
    """Refuse signs in a config that constrains none."""
    for where in _given(config, "dales_signs"):
        raise OptionError(
            f"dales_signs: those given for {where} would not be used, since apply_dales_principle is "
            "False; set apply_dales_principle=True, or leave the signs out"
        )


def _refuse_areas(config: BioConfig) -> None:
    """Refuse areas in a config that masks nothing."""
    for where in _given(config, "weight_mask_areas"):
        raise OptionError(
            f"weight_mask_areas: those given for {where} would not be used, since there are no "
            "weight_mask_blocks; give the densities between the areas, or leave the areas out"
        )


def _given(config: BioConfig, field: str) -> Iterator[str]:
    """Yield where a field that may be None is not, in words."""
    if getattr(config, field) is not None:
        yield "the model"
    for override in config.overrides:
        if dict(override.options).get(field) is not None:
            yield repr(override.selector)


def choose_passes(choice: PassChoice | None, config: BioConfig | None) -> Pipeline:
    """Return the pipeline for ``transform``: the config's, or what ``choice`` names.

    In ``choice`` a pass, or a text with options, stands for itself; a bare name takes its options from
    the config, if there is one that has options for it; ``...`` in a list stands for the config's own passes.

    Raises:
        PipelineError: malformed text, an unknown pass, one that the config switches off, no pass at all.
    """
    if choice is None:
        return compile_config(config if config is not None else BioConfig())
    if isinstance(choice, Pipeline):
        return choice
    passes: list[Pass] = []
    for entry in (choice,) if isinstance(choice, (str, Pass)) or not isinstance(choice, Iterable) else choice:
        if isinstance(entry, Pass):
            passes.append(entry)
            continue
        if entry is ...:
            passes += compile_config(config if config is not None else BioConfig()).passes
            continue
        if not isinstance(entry, str):
            raise PipelineError(
                f"passes: expected a pass, a pipeline's text or a list of them, found {entry!r}; write a "
                "pass with its options behind it: SplitWeights(gamma=2)"
            )
        written = [name.strip() for name in entry.split(",")]
        for member in Pipeline.parse(entry).passes:
            bare = member.name in _configurable() and str(member) == member.name and member.name in written
            passes += compile_config(config, [member.name]).passes if bare and config else (member,)
    return Pipeline(tuple(passes))


def _is_off(name: str, config: BioConfig) -> bool:
    """Whether a field switches a pass off for every layer there could be, or no field asks for it."""
    given = [config.options_for([]), *(dict(override.options) for override in config.overrides)]
    options = config_options().items()
    asking = [(field, declared.on[name]) for field, declared in options if name in declared.on]
    if asking and not any(
        asks(fields[field]) for field, asks in asking for fields in given if field in fields
    ):
        return True
    return any(
        all(declared.off[name](fields[field]) for fields in given if field in fields)
        for field, declared in options
        if name in declared.off
    )


def _configured(cls: type[Pass], config: BioConfig) -> Pass:
    overrides = [
        Override(override.selector, options)
        for override in config.overrides
        if (options := tuple(_as_options(cls.name, dict(override.options)).items()))
    ]
    return cls.from_options({**_as_options(cls.name, config.options_for([])), "overrides": tuple(overrides)})


def _as_options(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a pass reads as its options."""
    return {
        feeds.option: feeds.translate(fields[field])
        for field, feeds in _read_by(name).items()
        if field in fields
    }


def configure_layers(graph_module: BioGraphModule, config: BioConfig, sites: Sites) -> None:
    """Give the plasticity state of every layer the options that hold for the layer, overrides included.

    Args:
        graph_module: the rewritten model.
        config: of the whole model.
        sites: of its weights.

    Raises:
        SelectorError: an override's selector matches nothing.
    """
    index = NodeIndex(graph_module)
    matches = [index.matches(override.selector) for override in config.overrides]
    states = bio_modules(graph_module)
    made: dict[tuple[int, ...], BioConfig] = {}
    scaled = [weight for weight in sites.weights_and_reads(directly=True) if weight.path in states]
    for weight in {weight.path: weight for weight in (*sites.weights(), *scaled)}.values():
        active = tuple(
            number
            for number, found in enumerate(matches)
            if any(picks(match, site.node, site.layer) for match in found for site in weight.sites)
        )
        if weight.path not in states and is_taken(weight.path):
            continue  # which a pass has said
        if active not in made:
            fields = {name: value for number in active for name, value in config.overrides[number].options}
            made[active] = rule_config(config.replace(**fields))
        # made where there is none yet: rules may act on the weight later, and then by these options
        state = states.get(weight.path) or state_of(graph_module, weight)
        state.config = made[active]
        state.keep_buffers()
