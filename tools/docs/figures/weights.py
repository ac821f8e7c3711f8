"""Weights as matrices: with signs, and with a mask."""

from __future__ import annotations

import torch
from matplotlib.colors import ListedColormap
from torch import Tensor, nn

from biofx.config import BioConfig
from biofx.diagnostics.effective_weight import effective_weights
from biofx.model.graph_module import BioGraphModule
from biofx.operators.mask_ops import existing
from biofx.operators.rate_sampling import Distribution
from biofx.operators.sampling import generator_for
from biofx.plasticity.attach import attach
from biofx.plasticity.model_states import bio_modules
from biofx.plasticity.rule import Rule
from biofx.transform import transform
from docs.figures.figure import SIGNED, Drawn, canvas, panels, show_matrix, svg_of

_UNITS, _STEPS, _EVERY = 24, 200, 20
_LAYER = "2.weight"


def draw_signs(long: bool) -> Drawn:
    """Draw the weight between two layers: plain, with signs, and after training."""
    model = _network()
    plain = model.get_parameter(_LAYER).detach().clone()
    bio_model, _ = transform(model, BioConfig(apply_dales_principle=True))
    state = bio_modules(bio_model)[_LAYER]
    signs = state.signs()
    before = _acting(bio_model)
    _train(bio_model)
    after = _acting(bio_model)
    wrong = sum(int((signs * one < 0).sum()) for one in (before, after))
    figure = canvas(9.5, 3.1)
    titles = ("as torch initialised it", "with signs", f"after {_STEPS} steps of SGD")
    shown = (plain, before, after)
    limit = max(float(one.abs().quantile(0.99)) for one in shown)
    places = panels(figure, 1, 3)
    for axes, weight, title in zip(places, shown, titles, strict=True):
        image = show_matrix(axes, weight, title, "postsynaptic units", "presynaptic units", limit)
    figure.colorbar(image, ax=places, shrink=0.7, label="weight that acts")
    for axes in places[1:]:
        column = signs.expand_as(plain)[:1]
        strip = axes.inset_axes((0, 1.0, 1, 0.04))
        strip.imshow(column, cmap=SIGNED, vmin=-1.4, vmax=1.4, aspect="auto", interpolation="nearest")
        strip.set_axis_off()
        axes.set_title(axes.get_title(loc="left"), pad=12)
    caption = f"""
        The weight between two hidden layers under `apply_dales_principle`. A column is what one presynaptic
        unit does to all others; the strip above has its sign, red for excitatory. White is 0: balanced
        initial weights are sparse. Weights of the wrong sign in the two pictures on the right: {wrong}.
    """
    return Drawn(svg_of(figure), caption)


def draw_mask(long: bool) -> Drawn:
    """Draw which connections exist between areas, and which of them turnover moved."""
    config = BioConfig(
        fuzzy_lr_distribution=Distribution.BASELINE,
        weight_density=0.5,
        weight_mask_blocks=((1.0, 0.2), (0.2, 1.0)),
        rejuvenation_turnover=0.1,
        rejuvenation_selection="proportion",
    ).override("0", weight_mask_blocks=None, weight_density=1.0)
    bio_model, _ = transform(_network(), config.override("4", weight_mask_blocks=None, weight_density=1.0))
    begun = _connections(bio_model)
    _train(bio_model, Rule("rejuvenate_weights", every=_EVERY, after=_EVERY))
    now = _connections(bio_model)
    moved = begun.int() + 2 * now.int()  # 1 only then, 2 only now, 3 both
    figure = canvas(9.5, 3.4)
    left, middle, right = panels(figure, 1, 3)
    for axes, codes in ((left, 3 * begun.int()), (middle, moved)):
        axes.imshow(codes, cmap=_colours(), vmin=0, vmax=3, interpolation="nearest")
    left.set_title("connections at the start")
    middle.set_title(f"after {_STEPS // _EVERY - 1} runs of rejuvenate_weights")
    weight = _acting(bio_model)
    show_matrix(right, weight, "weights then", "", "", float(weight.abs().quantile(0.99)))
    for axes in (left, middle, right):
        axes.set(xticks=[], yticks=[], xlabel="presynaptic units", ylabel="postsynaptic units")
        axes.axhline(_UNITS / 2 - 0.5, color="black", linewidth=0.8)
        axes.axvline(_UNITS / 2 - 0.5, color="black", linewidth=0.8)
    caption = f"""
        Two areas of {_UNITS // 2} units: half of the connections within an area exist, a tenth of those
        between them (`weight_density`, `weight_mask_blocks`). In the middle what turnover moved in {_STEPS}
        steps: {int((moved == 2).sum())} connections are new (green), {int((moved == 1).sum())} are gone
        (orange). There were {int(begun.sum())}, and there are {int(now.sum())}.
    """
    return Drawn(svg_of(figure), caption)


def _colours() -> ListedColormap:
    """Return white for nothing, orange for gone, green for new and grey for what stayed."""
    return ListedColormap(["#ffffff", "#e8a33d", "#3f9b62", "#9aa5b1"])


def _network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(10, _UNITS), nn.ReLU(), nn.Linear(_UNITS, _UNITS), nn.ReLU(), nn.Linear(_UNITS, 3)
        )


def _train(model: BioGraphModule, *rules: Rule) -> None:
    """Learn to tell which of three thirds of a noisy input has the largest sum."""
    generator = generator_for(0, "figures", 0, purpose="figures")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached = attach(model, optimizer, list(rules)) if rules else None
    for _ in range(_STEPS):
        inputs = torch.randn(64, 10, generator=generator)
        labels = inputs[:, :9].unflatten(1, (3, 3)).sum(2).argmax(1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    if attached is not None:
        attached.detach()


def _acting(model: BioGraphModule) -> Tensor:
    """Return the weight that the layer uses."""
    found = effective_weights(model, bio_modules(model))[_LAYER]
    return found(model.get_parameter(_LAYER).detach()).detach().clone()


def _connections(model: BioGraphModule) -> Tensor:
    """Return which connections exist, ``(units, units)``."""
    mask = bio_modules(model)[_LAYER].connection_mask
    if mask is None:
        raise ValueError(f"{_LAYER} has no mask")
    return existing(mask).view(_UNITS, _UNITS).clone()
