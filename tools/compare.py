"""The README's comparison, measured: ``python tools/compare.py``.

Each row is one check, run on biofx, on the package of the paper (where it is installed: ``pip install
--no-deps pytorch-bio-transformations==0.0.5``) and on what one would otherwise write by hand: gradient hooks
on the parameters, and a loop over the weights after each step. Exits with 1 where the README differs.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table
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


def network(width: int = 80) -> nn.Sequential:
    """Return an MLP of three layers with weights on both sides of 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, width), nn.ReLU(), nn.Linear(width, 60), nn.ReLU(), nn.Linear(60, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    return model


def layer_at(model: nn.Module, path: str) -> nn.Linear:
    """Return a layer."""
    found = model.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found


def state_of(model: nn.Module, path: str) -> Any:
    """Return what a layer keeps of its plasticity."""
    return model.get_submodule(path).bio_mod


def call(model: object, method: str) -> None:
    """Call a method that a package put on a model or a layer."""
    getattr(model, method)()


def layer_as_used(model: nn.Module, path: str) -> Tensor:
    """Return the weight that a rewritten layer uses: the input of its linear node, evaluated."""
    graph_module: Any = copy.deepcopy(model)
    node = next(n for n in graph_module.graph.nodes if n.name == f"_{path}")
    output = next(n for n in graph_module.graph.nodes if n.op == "output")
    output.args = (node.args[1],)
    graph_module.graph.lint()
    graph_module.recompile()
    weight: Tensor = graph_module(torch.zeros(1, 40)).detach()
    return weight


def model_is_left_alone(contender: Contender) -> str:
    """Whether the model that goes in stays what it was."""
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = contender.rates(model)
    hooks = sum(len(parameter._backward_hooks or {}) for parameter in model.parameters())
    same = list(model.state_dict()) == list(before) and all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )
    return yes(same and result is not model and hooks == 0)


def random_state_is_left_alone(contender: Contender) -> str:
    """Whether global random numbers go on as if nothing had happened."""
    model = network()
    before = torch.get_rng_state()
    contender.rates(model)
    return yes(torch.equal(before, torch.get_rng_state()))


def effect_survives_a_copy(contender: Contender) -> str:
    """Whether the gradients of a deep copy are scaled, and by its own factors."""
    copied = copy.deepcopy(contender.rates(network()))
    plain = network()
    inputs = torch.randn(8, 40, generator=torch.Generator().manual_seed(1))
    for model in (plain, copied):
        model.zero_grad()
        model(inputs).square().mean().backward()
    contender.apply_rates(copied)
    gradient, unscaled = (layer_at(model, "0").weight.grad for model in (copied, plain))
    assert isinstance(gradient, Tensor)
    assert isinstance(unscaled, Tensor)
    return yes(torch.allclose(gradient, unscaled * contender.factors(copied), rtol=1e-4, atol=1e-7))


def effect_under_adam(contender: Contender) -> str:
    """How far factors carry through Adam: slope of log path length on log factor (1: whole, 0: erased).

    Path lengths are relative to those of the plain network on the same data.
    """
    model = contender.rates(network())
    path, alone = _path_under_adam(model, contender), _path_under_adam(network(), None)
    alive = (path > 0) & (alone > 0)
    x, y = contender.factors(model)[alive].log(), (path / alone)[alive].log()
    return f"{torch.cov(torch.stack((x, y)))[0, 1] / x.var() + 0.0:.1f}".replace("-0.0", "0.0")


def _path_under_adam(model: nn.Module, contender: Contender | None) -> Tensor:
    """Return how far each weight of the first layer went in 60 steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    if isinstance(contender, Biofx):
        biofx.attach(model, optimizer)
    weight = layer_at(model, "0").weight
    generator = torch.Generator().manual_seed(2)
    path = torch.zeros_like(weight)
    for _ in range(60):
        before = weight.detach().clone()
        optimizer.zero_grad()
        inputs = torch.randn(16, 40, generator=generator)
        (model(inputs) - inputs[:, :4]).square().mean().backward()
        if contender is not None:
            contender.apply_rates(model)
        optimizer.step()
        path += (weight.detach() - before).abs()
    return path


def columns_of_one_sign(contender: Contender) -> str:
    """Share of presynaptic units whose outgoing weights have one sign, after a step that broke it."""
    model = contender.signs(network())
    with torch.no_grad():
        weight = layer_at(model, "2").weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    columns = contender.weights_used(model).T
    return f"{statistics.mean(float((c >= 0).all() or (c <= 0).all()) for c in columns):.0%}"


def mean_of_gamma_factors(contender: Contender) -> str:
    """Mean of factors with the gamma distribution (the rate that one meant to set: 1)."""
    return f"{contender.factors(contender.rates(network(), 'gamma')).mean():.2f}"


def large_weights_survive_turnover(contender: Contender) -> str:
    """Share of the weights beyond 1 that are as they were after weak synapses were replaced."""
    model = network()
    before = layer_at(model, "2").weight.detach().clone()
    after = layer_at(contender.rejuvenated(model), "2").weight.detach()
    large = before.abs() > 1
    return f"{(after == before)[large].float().mean():.0%}"


def samples_are_independent(contender: Contender) -> str:
    """Whether splitting an odd layer leaves a sample's output alone when another one of the batch changes."""
    model = contender.split(network(width=81))
    inputs = torch.randn(8, 40, generator=torch.Generator().manual_seed(4))
    changed = inputs.clone()
    changed[0] += 1
    with torch.no_grad():
        same = torch.allclose(model(inputs)[1:], model(changed)[1:], atol=1e-5)
    return yes(same)


def says_what_it_did(contender: Contender) -> str:
    """Layers of the model of which there is a word on what was done, or why not."""
    result = biofx.transform(network()) if isinstance(contender, Biofx) else contender.rates(network())
    report = getattr(result, "report", None)
    return f"{len({remark.layer for remark in report.remarks}) if report else 0} of 3"


def yes(holds: bool) -> str:
    """Return what a table shows."""
    return "yes" if holds else "no"


ROWS: dict[str, Callable[[Contender], str]] = {
    "the model that goes in is left alone": model_is_left_alone,
    "so is the global random state": random_state_is_left_alone,
    "a deep copy learns by its own rates": effect_survives_a_copy,
    "rates under Adam (1: whole, 0: erased)": effect_under_adam,
    "presynaptic units of one sign, after a step": columns_of_one_sign,
    "mean of gamma factors (1 is meant)": mean_of_gamma_factors,
    "large weights kept by turnover": large_weights_survive_turnover,
    "splitting an odd layer keeps samples apart": samples_are_independent,
    "layers reported on": says_what_it_did,
}


def measure(contender: Contender, row: str) -> str:
    """Return a row's entry for a contender."""
    try:
        return ROWS[row](contender)
    except Exception:
        return "fails"


def contenders() -> list[Contender]:
    """Return biofx, the package of the paper where it is installed, and what is written by hand."""
    installed = importlib.util.find_spec("bio_transformations") is not None
    return [Biofx(), *([Reference()] if installed else []), ByHand()]


def told_in(readme: str) -> dict[str, dict[str, str]]:
    """Return the README's table: for each row the entry of each contender, by its name."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in readme.splitlines()
        if line.startswith("|")
    ]
    heading = next(cells for cells in lines if Biofx.name in cells and ByHand.name in cells)
    return {cells[0]: dict(zip(heading[1:], cells[1:], strict=True)) for cells in lines if cells[0] in ROWS}


def main() -> int:
    """Print the table, and return whether an entry of the README differs from it."""
    torch.set_num_threads(1)
    told = told_in((Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8"))
    table, differing = Table(box=None), []
    there = contenders()
    for heading in ("", *(contender.name for contender in there)):
        table.add_column(heading)
    for row in ROWS:
        found = {contender.name: measure(contender, row) for contender in there}
        table.add_row(row, *found.values())
        differing += [
            f"{row}, {name}: the README says {told.get(row, {}).get(name)!r}, found {entry!r}"
            for name, entry in found.items()
            if told.get(row, {}).get(name) != entry
        ]
    console = Console(highlight=False)
    console.print(table)
    for line in differing:
        console.print(line, style="red", markup=False)
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
