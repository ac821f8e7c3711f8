"""The user guide's front door: a converter that is configured once and applied to models or classes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from biofx.capture.capture import capture
from biofx.config import BioConfig
from biofx.errors import InputError
from biofx.layers import dense_kind_of
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import Sites
from biofx.model.graph_module import BioGraphModule
from biofx.model.region_parts import joined
from biofx.passes import ScaleGradients
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.model_states import bio_modules
from biofx.random_state import preserved_random_state
from biofx.rewriting.compile_config import compile_config, configure_layers
from biofx.rewriting.held_parameters import hold_parameters
from biofx.rewriting.pipeline import Pipeline
from biofx.rewriting.record import add_step, matches_of, remembering_config
from biofx.rewriting.reproducer import reproducing
from biofx.rewriting.signed_weights import warn_of_training

ConverterT = TypeVar("ConverterT", bound="BioConverter")


class BioConverter:
    """Converts models so that plasticity is applied by explicit calls in the training loop.

    It runs the passes of :func:`biofx.transform` but one: learning-rate factors do not act in the graph, they
    are applied when ``bio_model.fuzzy_learning_rates()`` is called. Every layer with a weight gets its state
    and rules as ``layer.bio_mod``; rules called on the model act on all layers.

    Args:
        config: the options, a config or a dict of its fields; the default config if None.
        **fields: fields of the config, over those of ``config``.

    Raises:
        OptionError: an unknown field or a bad value.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> bio_model = BioConverter(fuzzy_learning_rate_factor_nu=0.2)(model)
    >>> bio_model(torch.ones(3, 4)).sum().backward()
    >>> bio_model.fuzzy_learning_rates()
    {'0.weight': 24, '2.weight': 12}
    """

    def __init__(self, config: BioConfig | Mapping[str, Any] | None = None, **fields: Any) -> None:
        base = BioConfig() if config is None else config
        self.config = (base if isinstance(base, BioConfig) else BioConfig.from_dict(base)).replace(**fields)

    @classmethod
    def from_dict(cls: type[ConverterT], options: Mapping[str, Any]) -> ConverterT:
        """Return a converter with the options of a dict.

        Raises:
            OptionError: an unknown field or a bad value.
        """
        return cls(BioConfig.from_dict(options))

    def get_config(self) -> BioConfig:
        """Return the options in force."""
        return self.config

    def update_config(self, **fields: Any) -> None:
        """Change options for later conversions; models that are converted already keep theirs.

        Raises:
            OptionError: an unknown field or a bad value; nothing has been changed.
        """
        self.config = self.config.replace(**fields)

    def __call__(self, model: Any) -> Any:
        """Do the same as :meth:`convert`."""
        return self.convert(model)

    def convert(self, model: Any) -> Any:
        """Convert a model, or a class whose instances then come out converted.

        Args:
            model: an instance of ``nn.Module``, which is not changed, or a subclass of it.

        Returns:
            For an instance a :class:`BioGraphModule`. For a class a subclass of it, which may be subclassed
            further; calling it builds an instance as usual and returns that, converted.

        Raises:
            InputError: it is neither, or cannot be taken.
            CaptureError: its forward cannot be captured.
        """
        if isinstance(model, type) and issubclass(model, nn.Module):
            return _converting_class(copy.copy(self), model)
        if isinstance(model, type):
            raise InputError(f"expected a subclass of torch.nn.Module, found the class {model.__name__}")
        return self._convert_instance(model)

    @staticmethod
    def set_last_module_token_for_module(module: nn.Module) -> nn.Module:
        """Mark a layer as an output layer, whose weights are then not split; returns it."""
        module.last_module_token = True  # type: ignore[assignment]
        return module

    def _bio_modulize(self, module: nn.Module) -> None:
        """Give a module its state and rules, if it is a layer; override it to use a class of your own."""
        if dense_kind_of(module) is not None:
            module.add_module("bio_mod", BioModule(module, config=self.config))

    def _convert_instance(self, model: nn.Module) -> BioGraphModule:
        config = remembering_config(self.config)
        captured = capture(model)
        with preserved_random_state():
            for module in list(captured.modules()):
                if not isinstance(module, BioModule) and not isinstance(
                    module._modules.get("bio_mod"), BioModule
                ):
                    self._bio_modulize(module)
            passes = compile_config(config).passes
            in_graph = Pipeline(tuple(entry for entry in passes if not isinstance(entry, ScaleGradients)))
            with joined(captured):
                sites = find_sites(captured)
                _place(captured, config, sites)
                depths = {weight.path: weight.depth for weight in sites.weights()}
                matches = matches_of(in_graph, captured)
                with reproducing(lambda: capture(model), in_graph):
                    converted, report = in_graph.on_own(captured)
                _draw(converted, depths)
                hold_parameters(converted, config)
        add_step(converted, type(self).__qualname__, in_graph, config, matches=matches, unmet=report.unmet)
        warn_of_training(report, stacklevel=4)
        return converted


def _place(captured: BioGraphModule, config: BioConfig, sites: Sites) -> None:
    """Tell every layer's state where it is in the model, and what is configured there."""
    owners: dict[int, BioModule] = {}
    for path, module in list(captured.named_modules()):
        state = module._modules.get("bio_mod")
        if not isinstance(state, BioModule):
            continue
        shared = owners.get(id(module._parameters.get("weight")))
        if shared is not None:  # a tied weight has one state, whichever of its layers is asked
            module._modules["bio_mod"] = shared
            continue
        state.link(module)
        state.path = f"{path}.weight" if path else "weight"
        if state.parameter is not None:
            owners[id(state.parameter)] = state
    configure_layers(captured, config, sites)
    for state in bio_modules(captured).values():
        if not state.scaled_in_graph:  # drawn when the passes have run: they may give the weight another size
            state.forget_factors()


def _draw(converted: BioGraphModule, depths: Mapping[str, float]) -> None:
    """Let every layer's state draw its factors, for the weight that the passes have made of it."""
    for state in bio_modules(converted).values():
        if state.parameter is not None and not state.scaled_in_graph:
            state.depth = depths.get(state.path, 0.0)
            state.draw()
            state.hold_from_here()


def _converting_class(converter: BioConverter, original: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose instances come out converted once they are built, subclasses' too."""

    class Converting(type(original)):  # type: ignore[misc]
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            return converter._convert_instance(super().__call__(*args, **kwargs))

    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
    }
    converting: type[nn.Module] = Converting(original.__name__, (original,), names)
    return converting
