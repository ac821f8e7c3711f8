"""Signs that a user gives and that nothing uses: an error, since a model without them is another model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from biofx.analysis.sign_survey import SignSurvey
from biofx.errors import OptionError
from biofx.layers.weight_site import WeightSite
from biofx.select import Match, picks, show_pattern

WhyNot = Callable[[WeightSite, SignSurvey], str | None]
"""Why a weight has no signs, None if it has."""


def refuse_unused_signs(
    survey: SignSurvey,
    overrides: Iterable[tuple[Iterable[Match], Mapping[str, Any]]],
    everywhere: tuple[int, ...] | None,
    *,
    axis: str,
    why_not: WhyNot,
) -> None:
    """Check that all the signs that were given are those of units which some weight reads.

    Args:
        survey: the model, its signs constrained.
        overrides: what the pass's overrides pick, and the options they give.
        everywhere: signs that are given for all layers, None if there are none.
        axis: whose signs there are.
        why_not: asked of the weights that read a layer's units.

    Raises:
        OptionError: nothing uses some of them; the message names selector, layer and reason.
    """
    makers = survey.makers()
    given = [([*matches], options["signs"]) for matches, options in overrides if options.get("signs")]
    for matches, _ in given:
        for match in matches:
            picked = [path for path, site in makers.items() if picks(match, site.node, site.layer)]
            named = f"signs: those given for {show_pattern(match.pattern)}"
            _check(survey, picked or sorted(match.paths)[:1], named, axis, why_not)
    if everywhere is not None:
        _check(survey, list(makers), "signs: those given for every layer", axis, why_not)


def _check(survey: SignSurvey, paths: list[str], named: str, axis: str, why_not: WhyNot) -> None:
    if axis != "presynaptic":
        raise OptionError(
            f"{named} would not be used: with axis={axis!r} rows have signs, which are drawn, and units have "
            "none; give axis='presynaptic', or leave the signs out"
        )
    makers = survey.makers()
    if any(path in makers and survey.store.has_signs(path) for path in paths):
        return
    told = "; ".join(f"{path}: {', '.join(_reasons(survey, path, why_not))}" for path in paths[:3])
    raise OptionError(
        f"{named} are not used: no constrained weight reads those units ({told or 'it picks no layer'}); "
        "give signs to a layer whose units a constrained weight reads, or leave them out"
    )


def _reasons(survey: SignSurvey, path: str, why_not: WhyNot) -> Iterator[str]:
    """Yield why the units of a layer have no signs."""
    site = survey.makers().get(path)
    if site is None:
        yield "no units of it are known"
        return
    readers = survey.readers(path)
    for reader in readers:
        yield f"{reader.layer!r}, which reads them, has none: {why_not(reader, survey)}"
    if not readers:
        region = survey.region_after(site)
        known = "" if region is None else f", as Python calls {region!r} and what follows it"
        yield f"which weights read them is not known{known}"
