"""Ways to give a model diverse learning rates, signs, turnover and splitting."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from typing import Any, Protocol

import torch
from subject import call, layer_as_used, layer_at, state_of
from torch import Tensor, nn

import biofx

SPREAD = 0.16
"""The user guide's, dimensionless."""


class Contender(Protocol):
    """One way to give a model diverse learning rates, signs, turnover and splitting."""

    name: str

    def rates(self, model: nn.Module, distribution: str = "uniform") -> nn.Module:
        """Return a model with a learning rate per synapse, which :meth:`apply_rates` applies."""

    def apply_rates(self, model: nn.Module) -> None:
        """Scale the gradients, where that is a step of its own."""

    def factors(self, model: nn.Module) -> Tensor:
        """Return the factors of the first layer."""

    def signs(self, model: nn.Module) -> nn.Module:
        """Return a model under Dale's principle, which :meth:`weights_used` shows."""

    def weights_used(self, model: nn.Module) -> Tensor:
        """Return the second layer's weight as the forward uses it, after a step that broke the signs."""

    def rejuvenated(self, model: nn.Module) -> nn.Module:
        """Return the model after synapses were replaced."""

    def split(self, model: nn.Module) -> nn.Module:
        """Return a model with two synapses per connection."""


class Biofx:
    """This package."""

    name = "biofx"

    def rates(self, model: nn.Module, distribution: str = "uniform") -> nn.Module:
        """Put the factors into the graph."""
        config = {"fuzzy_lr_distribution": distribution, "fuzzy_learning_rate_factor_nu": SPREAD}
        return biofx.transform(model, config).graph_module

    def apply_rates(self, model: nn.Module) -> None:
        """Do nothing: the graph does it."""

    def factors(self, model: nn.Module) -> Tensor:
        """Return the factors in the graph."""
        factors: Tensor = state_of(model, "0").fuzzy_learning_rate_parameters
        return factors

    def signs(self, model: nn.Module) -> nn.Module:
        """Put the constraint into the graph."""
        config = {"apply_dales_principle": True, "fuzzy_learning_rate_factor_nu": 0}
        return biofx.transform(model, config).graph_module

    def weights_used(self, model: nn.Module) -> Tensor:
        """Ask the layer itself, column by column of the identity."""
        return layer_as_used(model, "2")

    def rejuvenated(self, model: nn.Module) -> nn.Module:
        """Replace one synapse in a hundred or so."""
        bio_model = biofx.transform(model).graph_module
        bio_model.rejuvenate_weights()
        return bio_model

    def split(self, model: nn.Module) -> nn.Module:
        """Sum pairs of channels."""
        return biofx.transform(model, {"weight_splitting_Gamma": 2}).graph_module


class Reference:
    """The package of the paper."""

    name = "reference 0.0.5"

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._package = importlib.import_module("bio_transformations.bio_converter")
            self._distribution = importlib.import_module("bio_transformations.bio_config").Distribution

    def _converted(self, model: nn.Module, **options: Any) -> nn.Module:
        converted: nn.Module = self._package.BioConverter(**options).convert(model)
        return converted

    def rates(self, model: nn.Module, distribution: str = "uniform") -> nn.Module:
        """Convert the model."""
        return self._converted(
            model,
            fuzzy_lr_distribution=self._distribution[distribution.upper()],
            fuzzy_learning_rate_factor_nu=SPREAD,
        )

    def apply_rates(self, model: nn.Module) -> None:
        """Call what the user guide has one call before each step."""
        call(model, "fuzzy_learning_rates")

    def factors(self, model: nn.Module) -> Tensor:
        """Return the factors of the first layer."""
        factors: Tensor = state_of(model, "0").fuzzy_learning_rate_parameters
        return factors

    def signs(self, model: nn.Module) -> nn.Module:
        """Convert the model."""
        return self._converted(model, apply_dales_principle=True)

    def weights_used(self, model: nn.Module) -> Tensor:
        """Enforce the signs, as the guide has one do after each step."""
        for module in model.modules():
            if hasattr(module, "bio_mod"):
                call(module.bio_mod, "enforce_dales_principle")
        return layer_at(model, "2").weight.detach()

    def rejuvenated(self, model: nn.Module) -> nn.Module:
        """Replace synapses by the default parameter."""
        converted = self._converted(model)
        call(converted, "rejuvenate_weights")
        return converted

    def split(self, model: nn.Module) -> nn.Module:
        """Convert the model."""
        return self._converted(model, weight_splitting_Gamma=2)


class ByHand:
    """Hooks and loops, as one writes them in an afternoon."""

    name = "by hand"

    def rates(self, model: nn.Module, distribution: str = "uniform") -> nn.Module:
        """Multiply the gradient of each weight in a hook."""
        for module in model.modules():
            if isinstance(module, nn.Linear):
                if distribution == "gamma":
                    gamma = torch.distributions.Gamma(1 / SPREAD**2, 1 / SPREAD**2)
                    factors = gamma.sample(module.weight.shape)
                else:
                    factors = torch.empty_like(module.weight).uniform_(1 - SPREAD, 1 + SPREAD)
                module.factors = factors
                module.weight.register_hook(lambda gradient, factors=factors: gradient * factors)
        return model

    def apply_rates(self, model: nn.Module) -> None:
        """Do nothing: the hooks do it."""

    def factors(self, model: nn.Module) -> Tensor:
        """Return the factors of the first layer."""
        factors = model.get_submodule("0").factors
        assert isinstance(factors, Tensor)
        return factors

    def signs(self, model: nn.Module) -> nn.Module:
        """Draw a sign for each input of each layer but the first and the last."""
        layer = layer_at(model, "2")
        layer.sign = torch.where(torch.rand(layer.in_features) < 0.5, 1.0, -1.0)
        return model

    def weights_used(self, model: nn.Module) -> Tensor:
        """Clamp the weights, as one must after each step."""
        layer: Any = model.get_submodule("2")
        with torch.no_grad():
            layer.weight.copy_((layer.weight * layer.sign).clamp(min=0) * layer.sign)
        weight: Tensor = layer.weight.detach()
        return weight

    def rejuvenated(self, model: nn.Module) -> nn.Module:
        """Draw the weakest weights anew."""
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    weak = module.weight.abs() < module.weight.std() / 8
                    module.weight[weak] = torch.randn(int(weak.sum())) * module.weight.std()
        return model

    def split(self, model: nn.Module) -> nn.Module:
        """Sum pairs of output units in a forward hook, and give each the sum."""
        for path in ("0", "2"):
            model.get_submodule(path).register_forward_hook(
                lambda module, inputs, output: output.unflatten(-1, (-1, 2)).sum(-1).repeat_interleave(2, -1)
            )
        return model


def contenders() -> list[Contender]:
    """Return biofx, the package of the paper where it is installed, and what is written by hand."""
    installed = importlib.util.find_spec("bio_transformations") is not None
    return [Biofx(), *([Reference()] if installed else []), ByHand()]
