"""Loss of plasticity, as the demo measures it."""

from __future__ import annotations

from matplotlib.ticker import MaxNLocator

from biofx.demo import continual
from biofx.demo.curves import mean_and_error
from docs.figures.figure import BIO, PLAIN, Drawn, canvas, panels, svg_of

_SHORT, _LONG = (1, 20), (3, 60)
"""Seeds and tasks."""


def draw(long: bool) -> Drawn:
    """Draw what a plain network and a rewritten one learn of tasks that follow one another."""
    seeds, tasks = _LONG if long else _SHORT
    outcome = continual.learn_on(seed=0, seeds=seeds, tasks=tasks, after_task=lambda run: None)
    figure = canvas(9.5, 3.6)
    wide, narrow = panels(figure, 1, 2, width_ratios=[1.6, 1])
    measures = (
        (wide, continual.ACCURACY, "digits read right before they were learned from (%)"),
        (narrow, continual.SILENT, "hidden units silent for every digit (%)"),
    )
    ends = {}
    for axes, measure, title in measures:
        for name, colour, label in (("plain", PLAIN, "plain"), ("bio", BIO, "rewritten")):
            mean, error = mean_and_error(100 * outcome.curves(name, measure))
            at = range(1, tasks + 1)
            axes.plot(at, mean, color=colour, linewidth=1.8, label=label)
            axes.fill_between(at, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
            ends[name, measure] = float(mean[-5:].mean())
        axes.set(title=title, xlabel="task", xlim=(1, tasks))
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    wide.legend(frameon=False, loc="lower left")
    plain, bio = (ends[name, continual.ACCURACY] for name in ("plain", "bio"))
    caption = f"""
        {tasks} tasks, each the same digits once with their pixels in a new order; {seeds}
        seed{"s" * (seeds > 1)}, Adam, two hidden layers of {continual.WIDTH} units. Last five tasks:
        {plain:.0f} % plain, {bio:.0f} % with `unit_turnover="redo"` and the rule `rejuvenate_units` every
        {continual.RULE.every} steps. `biofx demo` runs more of it.
    """
    return Drawn(svg_of(figure), caption)
