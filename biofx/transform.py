"""The front door."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from biofx.capture.capture import capture
from biofx.capture.example_inputs import ExampleInputs
from biofx.config import BioConfig
from biofx.errors import OptionError, PassError
from biofx.foreign_errors import foreign_errors_wrapped
from biofx.layers.weight_site import Sites
from biofx.model.graph_module import BioGraphModule
from biofx.model.region_parts import joined
from biofx.plasticity.unattached import watch_first_step
from biofx.random_state import preserved_random_state
from biofx.rewriting.compile_config import PassChoice, choose_passes, configure_layers
from biofx.rewriting.held_parameters import hold_parameters
from biofx.rewriting.pass_base import PassResult
from biofx.rewriting.pipeline import Observer, Pipeline
from biofx.rewriting.record import add_step, matches_of, remembering, remembering_config
from biofx.rewriting.reproducer import reproducing
from biofx.rewriting.signed_weights import warn_of_training
from biofx.select import NodeIndex, Selector


def transform(
    model: nn.Module | ExportedProgram,
    config: BioConfig | Mapping[str, Any] | None = None,
    *,
    passes: PassChoice | None = None,
    only: Selector | None = None,
    exclude: Selector | None = None,
    opaque: Sequence[str] = (),
    regions: bool = True,
    example_inputs: ExampleInputs | None = None,
    share_parameters: bool = False,
    observe: Observer | None = None,
) -> PassResult:
    """Capture a model and rewrite it so that it learns the way synapses do.

    The model itself is never changed, and the result shares no tensor with it unless asked to.

    Factors in its graph need :func:`biofx.attach` under optimizers of the Adam kind, which divide them out
    again; the first step of such an optimizer without it warns. So does a transform that makes weights sparse
    and balanced (``dales_initialisation``) which look as if they had been trained.

    Args:
        model: any module whose forward can be captured, a program of ``torch.export``, or a graph module of
            dynamo or ``make_fx``; see :func:`biofx.capture`.
        config: what to do, as a :class:`BioConfig` or a dict of its fields; the default config if None.
        passes: instead of the config's pipeline: a pass, a pipeline, its text, or a list of passes and
            names. A bare name takes its options from ``config``, and ``...`` in a list stands for the
            config's own passes: ``[..., MyPass()]`` adds one to them.
        only: rewrite only what this selects (see :mod:`biofx.select`).
        exclude: leave alone what this selects.
        opaque: paths of modules not to look into.
        regions: where something cannot be captured, let the module in which it is keep its eager forward and
            rewrite what that calls; if False, refuse.
        example_inputs: of one call; optional, see :func:`biofx.capture`.
        share_parameters: let the result hold the model's own parameters instead of copies, but for those that
            a pass gives other values (``mask-weights``, ``constrain-signs`` and ``expand-units`` do, and say
            so).
        observe: called after each pass that changed the graph, e.g. :func:`biofx.graph.print_changed`.

    Returns:
        The rewritten model and the report; unpacks as ``bio_model, report``.

    Raises:
        InputError: ``model`` is not a module that can be copied and traced.
        CaptureError: its forward cannot be captured; the message names the line.
        OptionError: the config has an unknown field or a bad value.
        SelectorError: a selector matches nothing.
        PipelineError: ``passes`` names an unknown pass, or the order is cyclic.

    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> bio_model, report = transform(model, {"weight_splitting_Gamma": 2}, passes="split-weights")
    >>> print(report)
    Sequential: 1 created, 1 rewired nodes; split-weights 1 of 2
    split-weights: 1 applied, 1 left alone
      applied 0: 3 groups of 2 of its 6 output channels summed; deployed, 3 channels and for equal rates 2 \
times the step of a plain layer
      missed  2: it is an output layer: no weights between it and the model's output; for equal rates 2 \
times the step of a plain layer, since it reads sums of 2
      created  _0_pooled = pool_synapses(_0, gamma=2, channel_axis=-1)
      rewired  _1 = self.1(_0_pooled)  # ReLU
    """
    checked = as_config(config)
    checked = None if checked is None else remembering_config(checked)
    pipeline = choose_passes(passes, checked)
    if only is not None or exclude is not None:
        pipeline = Pipeline((pipeline,), only=only, exclude=exclude, observe=observe)
    elif observe is not None:
        pipeline = dataclasses.replace(pipeline, observe=observe)
    pipeline = remembering(pipeline)

    def captured_again() -> BioGraphModule:
        return capture(model, opaque=opaque, regions=regions, example_inputs=example_inputs)

    def configured(sites: Sites) -> None:
        if checked is not None:
            configure_layers(captured, checked, sites)
            hold_parameters(captured, checked)

    captured = capture(
        model,
        share_parameters=share_parameters,
        opaque=opaque,
        regions=regions,
        example_inputs=example_inputs,
    )
    with foreign_errors_wrapped(PassError, f"the rewriting of {type(model).__name__}"), joined(captured):
        _check_overrides(captured, checked)
        matches = matches_of(pipeline, captured)
        with preserved_random_state(), reproducing(captured_again, pipeline):
            result = pipeline.on_own(captured, configured)
    add_step(
        result.graph_module,
        "transform",
        pipeline,
        checked,
        opaque=tuple(opaque),
        recorded=example_inputs is not None,
        matches=matches,
        unmet=result.report.unmet,
    )
    watch_first_step(result.graph_module)
    warn_of_training(result.report, stacklevel=2)
    return result


def as_config(config: BioConfig | Mapping[str, Any] | None) -> BioConfig | None:
    """Return a config that was given as one, as a dict, or not at all.

    Raises:
        OptionError: it is something else, or has an unknown field or a bad value.
    """
    if config is None or isinstance(config, BioConfig):
        return config
    if isinstance(config, Mapping):
        return BioConfig.from_dict(config)
    raise OptionError(f"config: expected a BioConfig or a dict of its fields, found {type(config).__name__}")


def _check_overrides(captured: BioGraphModule, config: BioConfig | None) -> None:
    """Refuse an override whose selector matches nothing, even where no pass would have asked it."""
    if config is not None and config.overrides:
        index = NodeIndex(captured)
        for override in config.overrides:
            index.matches(override.selector)
