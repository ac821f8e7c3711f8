"""Which weights the selectors of a schedule's entry pick in a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from torch import nn
from torch.fx import Node

from biofx.errors import SelectorError
from biofx.graph.joined_graph import whole_view
from biofx.layers.sites import find_sites
from biofx.plain_selectors import NamedNodes, called, show_selector
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.rule import Rule
from biofx.plasticity.unit_turnover import UnitTurnover
from biofx.select import Match, NodeIndex, Pattern, Selector, module_calls, picks


class PickedWeights:
    """Picks weights of a transformed model by selectors.

    Args:
        model: a graph module, not wrapped.
        states: of its weights and of other parameters that are held, by path.
    """

    def __init__(self, model: nn.Module, states: Mapping[str, BioModule]) -> None:
        self._states = states
        self._view: Any = whole_view(model)  # type: ignore[arg-type]

    def picked_by(self, rule: Rule) -> tuple[Rule, frozenset[str] | None]:
        """Return the paths of the weights that an entry acts on, and the entry without code of the user's.

        A weight is picked where one of its layers is, and none is excluded; None stands for all weights.
        Units are turned over with the first weight that makes them, whichever of those that do is picked.

        Raises:
            SelectorError: a selector matches nothing, or the entry is left without a weight.
        """
        if rule.only is None and rule.exclude is None:
            return rule, None
        try:
            included = None if rule.only is None else self._index.matches(rule.only)
            excluded = [] if rule.exclude is None else self._index.matches(rule.exclude)
        except SelectorError as error:
            raise SelectorError(f"rule {rule.name!r}: {error}") from error
        paths = {
            path
            for path in self._states
            if (included is None or self._is_picked(path, included)) and not self._is_picked(path, excluded)
        }
        if rule.name == "rejuvenate_units":
            paths |= self._leads_of(paths)
        if not paths:
            sides = [f"only={show_selector(rule.only)}"] if rule.only is not None else []
            sides += [f"exclude={show_selector(rule.exclude)}"] if rule.exclude is not None else []
            raise SelectorError(
                f"rule {rule.name!r}: expected selectors that pick a layer with a weight, found none that is "
                f"picked by {' and '.join(sides)}; {_first_of(self._states)}"
            )
        plain = Rule(
            *(rule.name, rule.every, rule.after, rule.until),
            only=_without_code(rule.only, included),
            exclude=_without_code(rule.exclude, excluded),
            options=rule.options,
        )
        return plain, frozenset(paths)

    @cached_property
    def _index(self) -> NodeIndex:
        return NodeIndex(self._view)

    @cached_property
    def _places(self) -> dict[str, list[tuple[Node, str]]]:
        """The nodes and layers of each weight that the graph reads, by its path."""
        found = find_sites(self._view).weights_and_reads(directly=True)
        return {weight.path: [(site.node, site.layer) for site in weight.sites] for weight in found}

    @cached_property
    def _nodes_in(self) -> dict[str, set[Node]]:
        """The nodes that were traced in each module itself, by its path."""
        found: dict[str, set[Node]] = {}
        for candidate in self._index.candidates:
            calls = module_calls(candidate.node)
            found.setdefault(calls[-1][0] if calls else "", set()).add(candidate.node)
        return found

    def _is_picked(self, path: str, matches: Iterable[Match]) -> bool:
        places = self._places.get(path)
        if places is not None:
            return any(picks(match, node, layer) for match in matches for node, layer in places)
        owner = path.rpartition(".")[0]  # a parameter that is no weight goes with the module that holds it
        here = self._nodes_in.get(owner, set())
        return any(owner in match.paths or bool(match.nodes & here) for match in matches)

    def _leads_of(self, paths: set[str]) -> set[str]:
        return {
            path
            for path, state in self._states.items()
            if isinstance(state.turnover, UnitTurnover)
            and any(writer.state.path in paths for writer in state.turnover.writers)
        }


def _first_of(states: Mapping[str, BioModule]) -> str:
    """Return the layers of the first weights, for a message."""
    layers = list(dict.fromkeys(path.rpartition(".")[0] for path in states))
    return f"layers with weights: {', '.join(map(repr, layers[:5]))}{', …' if len(layers) > 5 else ''}"


def _without_code(selector: Selector | None, matches: list[Match] | None) -> Selector | None:
    """Return a selector in which nodes stand for the predicates that picked them."""
    if selector is None or matches is None:
        return selector
    plain = [_named(match) for match in matches]
    return plain if isinstance(selector, (list, tuple)) else plain[0]


def _named(match: Match) -> Pattern:
    if isinstance(match.pattern, str):
        return match.pattern
    return NamedNodes(frozenset(node.name for node in match.nodes), called(match.pattern))
