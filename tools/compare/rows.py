"""The checks of the comparison, one a row."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import torch
from contenders import Biofx, Contender
from subject import layer_at, network
from torch import Tensor, nn

import biofx


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
