"""How the learning-rate factors of each distribution scatter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from biofx.config import BioConfig
from biofx.operators.rate_sampling import CHANGING, Distribution
from biofx.plasticity.model_states import bio_modules
from biofx.transform import transform
from docs.figures.figure import BIO, PLAIN, Drawn, canvas, panels, svg_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 200
_BINS = 60


def draw(long: bool) -> Drawn:
    """Draw a histogram for each distribution, of the factors of a real model."""
    figure = canvas(9.5, 6.6)
    places = panels(figure, 3, 4)
    for axes, distribution in zip(places, Distribution, strict=False):
        _draw(axes, distribution)
    for axes in places[::4]:
        axes.set_ylabel("% of synapses")
    for axes in places[-4:]:
        axes.set_xlabel("factor")
    for axes in places[len(Distribution) :]:
        axes.set_axis_off()
    config = BioConfig()
    changing = ", ".join(f"`{one.value}`" for one in CHANGING)
    caption = f"""
        Learning-rate factors of {_WIDTH * _WIDTH:,} weights of the first of three linear layers, by
        `fuzzy_lr_distribution`, with the defaults (ν = {config.fuzzy_learning_rate_factor_nu}, bounds
        {config.fuzzy_lr_min} and {config.fuzzy_lr_max}). Those of {changing} are the first ones, and can go
        on changing; `log_uniform` has bounds of its own. Above each its mean and standard deviation.
    """
    return Drawn(svg_of(figure), caption)


def _factors(distribution: Distribution) -> tuple[Tensor, Tensor]:
    """Return the factors of the first and of the last layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(3)))
    bio_model, _ = transform(model, BioConfig(fuzzy_lr_distribution=distribution))
    states = bio_modules(bio_model)
    found = [states[name].acting_factors if name in states else None for name in ("0.weight", "2.weight")]
    ones = torch.ones(_WIDTH, _WIDTH)  # without factors every rate is the optimizer's
    first, last = (ones if factors is None else factors.detach() for factors in found)
    return first.flatten(), last.flatten()


def _draw(axes: Axes, distribution: Distribution) -> None:
    first, last = (factors.tolist() for factors in _factors(distribution))
    is_logarithmic = distribution is Distribution.LOG_UNIFORM
    low, high = (1e-3, 10.0) if is_logarithmic else (0.25, 2.05)
    bins = (np.geomspace if is_logarithmic else np.linspace)(low, high, _BINS).tolist()
    weights = [100 / len(first)] * len(first)
    axes.hist(first, bins=bins, weights=weights, color=BIO, alpha=0.85)
    if distribution is Distribution.LAYER_ADAPTIVE:
        axes.hist(last, bins=bins, weights=weights, histtype="step", color=PLAIN, label="last\nlayer")
        axes.legend(fontsize=8, frameon=False)
    if is_logarithmic:
        axes.set_xscale("log")
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_title(distribution.value)
    shown = f"{np.mean(first):.2f} ± {np.std(first):.2f}"
    axes.set_title(shown, loc="right", fontsize=8, color="#555555")
    axes.tick_params(labelsize=8)
