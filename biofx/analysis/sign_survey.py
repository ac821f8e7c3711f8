"""What must be known of a model before signs are given: who reads whom, and where signs are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from biofx.analysis.sign_store import SignOptions, SignStore
from biofx.analysis.synapses import last_synapses
from biofx.analysis.unit_groups import unit_groups
from biofx.analysis.units import Reading
from biofx.errors import OptionError
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import Weight, WeightSite
from biofx.select import Match, picks, show_pattern

OptionsAt = Callable[["Node | None", str], SignOptions]
"""The options that hold for a layer, selected or not, by its node and path."""


class SignSurvey:
    """A model as it is before its signs are constrained."""

    def __init__(self, graph_module: GraphModule, options_at: OptionsAt) -> None:
        self._sites = find_sites(graph_module).found
        self.groups = unit_groups(graph_module)
        self.folded: dict[str, int] = {}
        """Negative gains that were folded away, counts by the path of the gain."""
        self._last = last_synapses(graph_module)
        first = {site.parameter_path: site for site in reversed(self._sites)}
        self._makers = {path: first[path] for path in self.groups.producers()}
        self.store = SignStore(
            graph_module,
            self.groups,
            lambda path: options_at(first[path].node, first[path].layer),
        )

    def makers(self) -> dict[str, WeightSite]:
        """Return the layers that make units, by the paths of their weights."""
        return self._makers

    def readers(self, path: str) -> list[WeightSite]:
        """Return the sites that read units which a layer makes."""
        own = set(self.groups.sources_of(self.groups.made_by(path)).sources)
        readings = self.groups.readings
        return [r.site for r in readings if own & set(self.groups.sources_of(r.units).sources)]

    def region_after(self, site: WeightSite) -> str | None:
        """Return the region at whose end a site stands, None if its graph goes on."""
        return self._last.get(site.node)

    @cached_property
    def layers(self) -> dict[Node, WeightSite]:
        """The layers with one weight that are modules, by their nodes."""
        return {s.node: s for s in self._sites if s.why_no_channels is None and not s.kind.is_product}

    def reading(self, site: WeightSite) -> Reading:
        """Return what a site reads."""
        return self.groups.reading(site)

    def reads_only_inputs(self, site: WeightSite) -> bool:
        """Whether nothing that it reads depends on a weight."""
        sources = self.groups.sources_of(self.reading(site).units).sources
        return all(source.kind in ("input", "constant") for source in sources)

    def is_readout(self, site: WeightSite) -> bool:
        """Whether it leads to nothing but outputs of the model; units that speak to each other do not."""
        return (
            self._last.get(site.node, "") is None
            and site.role in ("input", "attention_output")
            and not self._recurs(site)
        )

    def region_that_feeds(self, site: WeightSite) -> str | None:
        """Return the region to which Python hands all that it reads, None if something known feeds it."""
        return self.groups.region_that_feeds(self.reading(site))

    def region_that_follows(self, site: WeightSite) -> str | None:
        """Return the region at whose end it stands, so that Python decides whether it is a readout."""
        speaks_on = site.role not in ("input", "attention_output") or self._recurs(site)
        return None if speaks_on else self._last.get(site.node)

    def is_exempt(self, site: WeightSite) -> bool:
        """Whether all of its outputs are only compared with each other."""
        return bool(self.exempt_rows(site).all())

    def exempt_rows(self, site: WeightSite) -> Tensor:
        """Return which rows of the weight make outputs that are only compared, bool, ``(rows,)``."""
        return self.groups.exempt_rows(site)

    def why_no_signs(self, site: WeightSite) -> str | None:
        """Return why a weight has no presynaptic units, at this use or at another, None if it has."""
        if site.kind.why_no_units:
            return f"{site.kind.why_no_units}, which could have a sign"
        other = self._without_units.get(id(site.parameter))
        return None if other is None else f"its weight is also read by {other!r}, where signs mean nothing"

    @cached_property
    def _without_units(self) -> dict[int, str]:
        return {id(site.parameter): site.node.name for site in self._sites if site.kind.why_no_units}

    def is_used_elsewhere(self, weight: Weight) -> bool:
        """Whether there are uses of the parameter besides the weight's sites, which are left as they are."""
        return self._uses[weight.path] > len(weight.sites)

    @cached_property
    def _uses(self) -> Counter[str]:
        return Counter(site.parameter_path for site in self._sites)

    def has_known_signs(self, site: WeightSite) -> bool:
        """Whether every unit that it reads has a sign already."""
        return self.store.knows(self.reading(site))

    def norms_read_by(self, weights: list[Weight]) -> set[Node]:
        """Return the normalisations that act on units which some of the weights read."""
        readings = [self.reading(site).units for weight in weights for site in weight.sites]
        spoken = torch.zeros(self.groups.count, dtype=torch.bool)
        for units in readings:
            spoken[self.groups.representatives(units)] = True
        return {
            node
            for node, units in self.groups.norms.items()
            if bool(spoken[self.groups.representatives(units.flatten())].any())
        }

    def what_is_not_guaranteed(self, site: WeightSite) -> str:
        """Return words on what a sign does not say here, empty where it says it all."""
        reading = self.reading(site)
        told = ""
        if not reading.nonnegative:
            told += (
                "; the activity that it reads may be negative, so a sign is that of the weights, "
                "not of their effect"
            )
        opened = [
            source.name for source in self.groups.sources_of(reading.units).sources if source.kind == "open"
        ]
        for name in opened:
            reason = next((why for node, why in self.groups.ends.items() if node.name == name), None)
            if reason is not None:
                told += f"; its units begin at {name!r}, because {reason}"
        return told

    def _recurs(self, site: WeightSite) -> bool:
        return site.kind.is_compound and site.role == "input"


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
