"""What must be known of a model before signs are given: who reads whom, and where signs are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from biofx.analysis.observation import GIVE_EXAMPLES, find_all_sites, weights_in_python
from biofx.analysis.readouts import last_synapses
from biofx.analysis.sign_store import SIGNS, SignOptions, SignStore
from biofx.analysis.unit_groups import unit_groups
from biofx.analysis.units import Source
from biofx.errors import OptionError
from biofx.layers.weight_site import Weight, WeightSite
from biofx.model.observed_runs import observed_runs_of
from biofx.option_names import named_option
from biofx.select import Match, picks, show_pattern

OptionsAt = Callable[["Node | None", str], SignOptions]
"""The options that hold for a layer, selected or not, by its node and path."""


class SignSurvey:
    """What must be known of a model before its signs are constrained."""

    def __init__(self, graph_module: GraphModule, options_at: OptionsAt) -> None:
        sites = find_all_sites(graph_module)
        self._sites = [*sites.found, *weights_in_python(sites)]
        self.groups = unit_groups(graph_module)
        self.folded: dict[str, int] = {}
        """Negative gains that were folded away, counts by the path of the gain."""
        self._last = last_synapses(graph_module)
        self.what_is_missing = _what_is_missing(observed_runs_of(graph_module).reason)
        """What would say who feeds whom where Python decides."""
        self._uses = Counter(site.parameter_path for site in self._sites)
        self._without_units = [site for site in reversed(self._sites) if site.kind.why_no_units]
        first = {site.parameter_path: site for site in reversed(self._sites)}
        self.makers = {path: first[path] for path in self.groups.producers() if path in first}
        """The layers that make units, by the paths of their weights; those that the graphs show."""
        self.layers = {s.node: s for s in self._sites if s.is_plain_layer}
        """The layers with one weight that are modules, by their nodes."""
        self.store = SignStore(
            graph_module,
            self.groups,
            lambda path: options_at(first[path].node if path in first else None, path.rpartition(".")[0]),
        )

    def readers(self, path: str) -> list[WeightSite]:
        """Return the sites that read units which a layer makes."""
        own = set(self.groups.sources_of(self.groups.made_by(path)).sources)
        return [r.site for r in self.groups.readings if own & set(self._sources(r.site))]

    def reads_only_inputs(self, site: WeightSite) -> bool:
        """Whether nothing that it reads depends on a weight."""
        return all(source.kind in ("input", "constant") for source in self._sources(site))

    def is_readout(self, site: WeightSite) -> bool:
        """Whether it leads to nothing but outputs of the model; a recurrent layer leads to itself."""
        return self._last.get(site.node, "") is None and _leads_outwards(site)

    def region_that_follows(self, site: WeightSite) -> str | None:
        """Return the region that a site ends, so that Python decides whether it is a readout."""
        return self._last.get(site.node) if _leads_outwards(site) else None

    def region_after(self, site: WeightSite) -> str | None:
        """Return the region whose last weight is that of a site, None if its graph goes further."""
        return self._last.get(site.node)

    def is_exempt(self, site: WeightSite) -> bool:
        """Whether all of its outputs are only compared with each other."""
        return bool(self.groups.exempt_rows(site).all())

    def why_no_signs(self, site: WeightSite) -> str | None:
        """Return why a weight has no presynaptic units, at this use or at another, None if it has."""
        if site.kind.why_no_units:
            return f"{site.kind.why_no_units}, which could have a sign"
        if (reason := self.groups.why_not_known(site)) is not None:
            return reason
        for other in self._without_units:
            if other.parameter is site.parameter:
                return f"its weight is also read by {other.node.name!r}, where signs mean nothing"
        return None

    def is_used_elsewhere(self, weight: Weight) -> bool:
        """Whether there are uses of the parameter besides the weight's sites, which are left as they are."""
        return self._uses[weight.path] > len(weight.sites)

    def has_known_signs(self, site: WeightSite) -> bool:
        """Whether every unit that it reads has a sign already."""
        return self.store.knows(self.groups.reading(site))

    def has_given_signs(self, site: WeightSite) -> bool:
        """Whether signs were given for a unit that it reads."""
        return self.store.has_given(self.groups.reading(site))

    def norms_read_by(self, weights: list[Weight]) -> set[Node]:
        """Return the normalisations that act on units which some of the weights read."""
        is_read = torch.zeros(self.groups.count, dtype=torch.bool)
        for site in (site for weight in weights for site in weight.sites):
            is_read[self.groups.representatives(self.groups.reading(site).units)] = True
        return {
            node
            for node, units in self.groups.norms.items()
            if bool(is_read[self.groups.representatives(units.flatten())].any())
        }

    def what_is_not_guaranteed(self, site: WeightSite) -> str:
        """Return words on what a sign does not say here, empty where it says it all."""
        words = _OF_DRIVES[self.groups.drive_sign(site)] + self.what_contradicts(site)
        if not self.groups.reading(site).nonnegative:
            words = (
                "; the activity that it reads may be negative, so a sign is that of the weights, "
                "not of their effect"
            )
        if (product := self.groups.weighed_besides(site)) is not None:
            words += f"; {product!r} reads some of these units, too, with a weight that has no signs"
        reasons = self.groups.why_ended
        begin = [source.name for source in self._sources(site) if source.kind == "open"]
        told = {reasons.get(name) for name in begin}
        for name in self.groups.where_units_begin(site):  # at any use
            if reasons.get(name) not in told:
                told.add(reasons.get(name))
                begin.append(name)
        for name in begin:
            if name in reasons:
                words += f"; its units begin at {name!r}, because {reasons[name]}"
        return words

    def what_contradicts(self, site: WeightSite) -> str:
        """Return words where the model itself builds both signs into one unit, empty where it does not."""
        if not self.store.contradicts_itself(self.groups.reading(site)):
            return ""
        return "; the forward builds excitation and inhibition into weights that read the same unit"

    def _sources(self, site: WeightSite) -> list[Source]:
        return self.groups.sources_of(self.groups.reading(site).units).sources


def _what_is_missing(reason: str) -> str:
    if reason:
        return f"a run could not be observed: {reason}"
    return GIVE_EXAMPLES


def _leads_outwards(site: WeightSite) -> bool:
    """Whether the units that a weight makes are outputs of its layer and not read inside it."""
    recurs = site.kind.is_compound and site.role == "input"
    return site.role in ("input", "attention_output") and not recurs


_OF_DRIVES = {
    1: "",
    -1: "; the forward subtracts what it drives, so its effect is the opposite of its sign",
    0: "; the forward adds what it drives in one place and subtracts it in another, so a sign is that of the "
    "weights, not of their effect",
}
"""Words on the sign with which acts what a weight drives."""

WhyNot = Callable[[WeightSite, SignSurvey], str | None]
"""Returns why a weight has no signs, None if it has."""


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
        overrides: what each override of the pass selects, and its options.
        everywhere: signs that are given for all layers, None if there are none.
        axis: which axis of a weight has signs, an option of the pass.
        why_not: called with the weights that read a layer's units.

    Raises:
        OptionError: nothing uses some of them; the message names selector, layer and reason.
    """
    makers = survey.makers
    given = [([*matches], options["signs"]) for matches, options in overrides if options.get("signs")]
    for matches, _ in given:
        for match in matches:
            picked = [path for path, site in makers.items() if picks(match, site.node, site.layer)]
            named = f"{SIGNS}: those given for {show_pattern(match.pattern)}"
            _check(survey, picked or sorted(match.paths)[:1], named, axis, why_not)
    if everywhere is not None:
        _check(survey, list(makers), f"{SIGNS}: those given for every layer", axis, why_not)


def _check(survey: SignSurvey, paths: list[str], named: str, axis: str, why_not: WhyNot) -> None:
    if axis != "presynaptic":
        given = named_option("constrain-signs", "axis", axis)
        raise OptionError(
            f"{named} would not be used: with {given}, rows have signs, which are sampled, and units "
            "have none; give axis='presynaptic', or leave the signs out"
        )
    makers = survey.makers
    if any(path in makers and survey.store.has_signs(path) for path in paths):
        return
    known = "; ".join(f"{path}: {', '.join(_reasons(survey, path, why_not))}" for path in paths[:3])
    raise OptionError(
        f"{named} are not used: no constrained weight reads those units ({known or 'it picks no layer'}); "
        "give signs to a layer whose units a constrained weight reads, or leave them out"
    )


def _reasons(survey: SignSurvey, path: str, why_not: WhyNot) -> Iterator[str]:
    """Yield why the units of a layer have no signs."""
    site = survey.makers.get(path)
    if site is None:
        yield "no units of it are known"
        return
    readers = survey.readers(path)
    for reader in readers:
        yield f"{reader.layer!r}, which reads them, has none: {why_not(reader, survey)}"
    if not readers:
        region = survey.region_after(site)
        known = ""
        if region is not None:
            known = f", as Python calls {region!r} and what follows it; {survey.what_is_missing}"
        yield f"which weights read them is not known{known}"
