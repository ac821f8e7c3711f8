"""Rules on a schedule: which run at a step, on which weights, and with which options.

At one step a rule runs at most once on a weight. Where two entries of a rule would meet on one, the schedule
is refused; entries with other weights each run on theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import nn

from biofx.config import BioConfig, config_options
from biofx.errors import OptionError
from biofx.plain_selectors import selector_from_plain, selector_to_plain
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.consolidated_state import RULES
from biofx.plasticity.picked_weights import PickedWeights
from biofx.plasticity.rule import Rule


@dataclass(frozen=True)
class Entry:
    """A rule of a schedule, and the weights that it acts on."""

    rule: Rule
    paths: frozenset[str] | None = None
    """Of the weights; None for all."""

    def names(self, path: str) -> bool:
        """Whether a weight is one of them."""
        return self.paths is None or path in self.paths

    def covers(self, state: BioModule) -> bool:
        """Whether a weight is one of them, and not one that another method of consolidation holds."""
        method = RULES.get(self.rule.name, state.config.consolidation)
        return self.names(state.path) and state.config.consolidation == method

    def to_plain(self) -> dict[str, Any]:
        """Return it as plain values, for a file; without selectors and options as version 0.1.0 wrote it."""
        rule = self.rule
        plain: dict[str, Any] = {name: getattr(rule, name) for name in ("name", "every", "after", "until")}
        for side in ("only", "exclude"):
            if getattr(rule, side) is not None:
                plain[side] = selector_to_plain(getattr(rule, side))
        if self.paths is not None:
            plain["paths"] = sorted(self.paths)
        return {**plain, "options": dict(rule.options)} if rule.options else plain

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Entry:
        """Return what :meth:`to_plain` wrote down.

        Raises:
            KeyError, TypeError, OptionError: it did not.
        """
        fields = dict(plain)
        paths = fields.pop("paths", None)
        sides = {
            side: selector_from_plain(fields.pop(side)) for side in ("only", "exclude") if side in fields
        }
        return cls(Rule(**fields, **sides), None if paths is None else frozenset(paths))

    def is_like(self, other: Entry) -> bool:
        """Whether both run the same at the same times on the same weights, however these were picked."""
        names = ("name", "every", "after", "until", "options")
        alike = all(getattr(self.rule, name) == getattr(other.rule, name) for name in names)
        return alike and self.paths == other.paths


class Schedule:
    """The entries of a schedule for one model.

    Args:
        rules: in the order in which they run at a step.
        model: transformed, not wrapped.
        states: of its weights, by path.

    Raises:
        OptionError: two entries of a rule would act on a weight at one step, or differ in what is read
            between runs; an option changes what was decided when the model was transformed.
        SelectorError: a selector matches nothing, or picks no weight.
    """

    def __init__(self, rules: Iterable[Rule], model: nn.Module, states: Mapping[str, BioModule]) -> None:
        self.rules = tuple(rules)
        """As they were given."""
        picked = PickedWeights(model, states)
        self.entries = tuple(Entry(*picked.picked_by(rule)) for rule in self.rules)
        """The same, with their weights."""
        self._made: dict[Any, tuple[BioConfig, BioConfig]] = {}
        for entry in self.entries:
            self._check_options(entry, states)
        for one, other in combinations(self.entries, 2):
            if one.rule.name == other.rule.name:
                _refuse_meeting(one, other, states)

    @property
    def names(self) -> list[str]:
        """The rules that are scheduled, each once."""
        return list(dict.fromkeys(rule.name for rule in self.rules))

    def has(self, name: str, state: BioModule) -> bool:
        """Whether a rule is scheduled for a weight, at whatever step."""
        return any(entry.rule.name == name and entry.covers(state) for entry in self.entries)

    def due(self, step: int) -> dict[str, list[Entry]]:
        """Return the entries that are due at a step, by the names of their rules in the order of running."""
        found: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.rule.is_due(step):
                found.setdefault(entry.rule.name, []).append(entry)
        return found

    @contextmanager
    def in_force(self, states: Iterable[BioModule], step: int | None = None) -> Iterator[None]:
        """Let the options of entries hold for their weights.

        Args:
            states: of the weights.
            step: whose due entries are meant; None for those options alone that are read between runs.
        """
        configs: list[tuple[BioModule, BioConfig]] = []
        try:
            giving = [entry for entry in self.entries if entry.rule.options]
            for state in states if giving else ():
                fields = _fields(giving, state, step)
                if fields:
                    configs.append((state, state.config))
                    state.config = self._changed(state.config, fields)
            yield
        finally:
            for state, config in configs:
                state.config = config

    @contextmanager
    def entry_in_force(self, entry: Entry, states: Iterable[BioModule]) -> Iterator[None]:
        """Let the options of one entry hold for its weights, whenever it is due."""
        alone = object.__new__(Schedule)
        alone.rules, alone.entries, alone._made = (entry.rule,), (entry,), self._made
        with alone.in_force(states, entry.rule.after):
            yield

    def _changed(self, config: BioConfig, fields: dict[str, Any]) -> BioConfig:
        """Return a config with some fields changed; made once."""
        key = id(config), tuple(fields.items())
        known = self._made.get(key)
        if known is None or known[0] is not config:
            known = self._made[key] = config, config.replace(**fields)
        return known[1]

    def _check_options(self, entry: Entry, states: Mapping[str, BioModule]) -> None:
        """Refuse options that do not go together, or that change what the model was made with."""
        rule = entry.rule
        covered = [state for state in states.values() if entry.covers(state)] if rule.options else []
        able = [state for state in covered if state.parameter is not None and not state.why_never(rule.name)]
        for state in able or covered:
            for field, value in rule.options:
                shapes = config_options()[field].rules[rule.name].shapes
                found = getattr(state.config, field)
                if shapes is not None and shapes(value) != shapes(found):
                    raise OptionError(
                        f"rule {rule.name!r}: {field} is decided when the model is transformed: found "
                        f"{value!r} at the rule, where {state.path!r} has {found!r}; transform with "
                        f"BioConfig({field}={value!r}) or config.override(layers, {field}={value!r})"
                    )
            try:
                self._changed(state.config, dict(rule.options))
            except OptionError as error:
                raise OptionError(f"rule {rule.name!r}: {error}") from error

    # saved, loaded and copied

    def to_plain(self) -> list[dict[str, Any]]:
        """Return the entries as plain values, for a file."""
        return [entry.to_plain() for entry in self.entries]

    def is_like(self, entries: Iterable[Entry]) -> bool:
        """Whether entries that were saved make the same schedule."""
        saved = list(entries)
        return len(saved) == len(self.entries) and all(map(Entry.is_like, self.entries, saved))

    def __getstate__(self) -> dict[str, Any]:
        # what a user's predicate has picked is known, and takes the place of its code
        return {**vars(self), "rules": tuple(entry.rule for entry in self.entries), "_made": {}}


def _fields(entries: Iterable[Entry], state: BioModule, step: int | None) -> dict[str, Any]:
    """Return what entries give a weight at a step, by the names of fields."""
    found: dict[str, Any] = {}
    for entry in entries:
        if entry.covers(state):
            is_due = step is not None and entry.rule.is_due(step)
            found.update(entry.rule.options if is_due else _lasting(entry.rule))
    return found


def _lasting(rule: Rule) -> dict[str, Any]:
    """Return the options of an entry that are read between its runs too."""
    return {name: value for name, value in rule.options if config_options()[name].rules[rule.name].lasts}


def _refuse_meeting(one: Entry, other: Entry, states: Mapping[str, BioModule]) -> None:
    """Refuse two entries of a rule that give a weight different orders.

    Raises:
        OptionError: they do.
    """
    both = [state for state in states.values() if one.covers(state) and other.covers(state)]
    step = one.rule.first_step_with(other.rule) if both else None
    if step is not None:
        raise OptionError(
            f"schedule: {one.rule} and {other.rule} are both due at step {step} for {both[0].path!r}, and a "
            "rule runs once a step on a weight; give them other layers (only=, exclude=) or times (after=, "
            "until=)"
        )
    for state in both:
        first, second = ({**vars(state.config), **_lasting(entry.rule)} for entry in (one, other))
        for name in {**_lasting(one.rule), **_lasting(other.rule)}:
            if first[name] != second[name]:
                raise OptionError(
                    f"schedule: expected one value of {name} in all entries of {one.rule.name!r} for "
                    f"{state.path!r}, since it is read at every step, found {first[name]!r} and "
                    f"{second[name]!r}"
                )
