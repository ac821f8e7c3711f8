"""An entry of a schedule: which rule runs, when, on which layers, and with which options."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from biofx.config import config_options, rule_options
from biofx.errors import OptionError, SelectorError, suggest
from biofx.options import Range
from biofx.plain_selectors import show_selector
from biofx.select import Selector, check_selector


@dataclass(frozen=True)
class Rule:
    """When a plasticity rule runs, on which layers, and with which options.

    Options are those of the config that the rule reads (``biofx config --rule NAME`` lists them), by the
    name of the field or by the rule's shorter one: ``Rule("synaptic_scaling", every=10, rate=0.2)`` is
    ``synaptic_scaling_rate=0.2`` at this entry of the schedule. Where none is given, the config's holds.
    Several entries may be of one rule, with other options, times or layers, as long as no weight would
    follow two of them at one step.

    Raises:
        OptionError: ``every`` is not positive, ``after`` negative, or ``until`` not past ``after``; the rule
            has no such option, or the value is out of its range.
        SelectorError: ``only`` or ``exclude`` is not a selector.

    >>> str(Rule("rejuvenate_weights", every=100, only="layer4.*", turnover=0.02))
    "rejuvenate_weights every 100 on 'layer4.*' (turnover=0.02)"
    """

    name: str
    """A method that the model's layers offer, e.g. ``"rejuvenate_weights"``."""
    every: int = 1
    """Optimizer steps from one run to the next, a count >= 1."""
    after: int = 0
    """Optimizer steps before the first run, a count."""
    until: int | None = None
    """Optimizer steps after which it no longer runs; None for no end."""
    only: Selector | None = None
    """The layers it runs on, as :mod:`biofx.select` picks them; None for all."""
    exclude: Selector | None = None
    """Layers that it leaves alone."""
    options: tuple[tuple[str, Any], ...] = ()
    """Fields of the config with other values at this entry, by the name of the field."""

    def __init__(
        self,
        name: str,
        every: int = 1,
        after: int = 0,
        until: int | None = None,
        *,
        only: Selector | None = None,
        exclude: Selector | None = None,
        options: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        **more: Any,
    ) -> None:
        Range(1, whole=True).check(f"rule {name!r}: every", every)
        Range(0, whole=True).check(f"rule {name!r}: after", after)
        if until is not None:
            Range(after + 1, whole=True).check(f"rule {name!r}: until", until)
        sides = {"only": only, "exclude": exclude}
        checked = {side: _checked_selector(name, side, given) for side, given in sides.items()}
        fields = _fields_of(name, [*dict(options).items(), *more.items()])
        values = {"name": name, "every": every, "after": after, "until": until, **checked, "options": fields}
        for field, value in values.items():
            object.__setattr__(self, field, value)

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)[1:-1]
        given = {each.name: getattr(self, each.name) for each in fields}
        changed = {each.name: given[each.name] for each in fields if given[each.name] != each.default}
        told = [f"{name}={value!r}" for name, value in {**changed, **self._by_short_names()}.items()]
        return f"{type(self).__name__}({', '.join([repr(self.name), *told])})"

    def __str__(self) -> str:
        every = f" every {self.every}" if self.every > 1 else ""
        after = f" after {self.after}" if self.after else ""
        until = "" if self.until is None else f" until {self.until}"
        only = "" if self.only is None else f" on {show_selector(self.only)}"
        exclude = "" if self.exclude is None else f" not on {show_selector(self.exclude)}"
        told = ", ".join(f"{name}={value!r}" for name, value in self._by_short_names().items())
        return f"{self.name}{every}{after}{until}{only}{exclude}{f' ({told})' if told else ''}"

    def _by_short_names(self) -> dict[str, Any]:
        names = {field: short for short, field in rule_options(self.name).items()}
        return {names[field]: value for field, value in self.options}

    def is_due(self, step: int) -> bool:
        """Whether it runs at the optimizer's step of that number, counted from 0."""
        past_end = self.until is not None and step >= self.until
        return step >= self.after and not past_end and (step - self.after) % self.every == 0

    def first_step_with(self, other: Rule) -> int | None:
        """Return the first step at which both are due, None if there is none.

        >>> Rule("halve", every=4).first_step_with(Rule("halve", every=6, after=2))
        8
        """
        start = max(self.after, other.after)
        ends = [entry.until for entry in (self, other) if entry.until is not None]
        period = math.lcm(self.every, other.every)
        stop = min([*ends, start + period])
        first = start + (self.after - start) % self.every
        steps = range(first, stop, self.every)
        return next((step for step in steps if (step - other.after) % other.every == 0), None)


def _checked_selector(name: str, side: str, selector: Selector | None) -> Selector | None:
    try:
        return None if selector is None else check_selector(selector)
    except SelectorError as error:
        raise SelectorError(f"rule {name!r}: {side}: {error}") from error


def _fields_of(rule: str, options: Iterable[tuple[str, Any]]) -> tuple[tuple[str, Any], ...]:
    """Return options by the config's names, checked, in the order of the config."""
    known = rule_options(rule)
    fields: dict[str, Any] = {}
    for name, value in options:
        field = known.get(name, name)
        if field not in known.values():
            raise OptionError(_unknown(rule, name, known))
        if field in fields:
            raise OptionError(f"rule {rule!r}: {field} is given twice; leave one out")
        fields[field] = config_options()[field].permitted.check(f"rule {rule!r}: {field}", value)
    return tuple((field, fields[field]) for field in known.values() if field in fields)


def _unknown(rule: str, name: str, known: Mapping[str, str]) -> str:
    """Return what to say of an option that a rule does not have."""
    if not known:
        named = sorted({each for declared in config_options().values() for each in declared.rules})
        return f"rule {rule!r} has no options, found {name!r}{suggest(rule, named)}"
    listed = ", ".join(short if short == field else f"{short} ({field})" for short, field in known.items())
    if name in config_options():
        return (
            f"rule {rule!r} does not read {name!r}: set it in the config, BioConfig({name}=…) or "
            f"config.override(layers, {name}=…); options of the rule: {listed}"
        )
    near = suggest(name, [*known, *known.values()])
    return f"rule {rule!r} has no option {name!r}{near or ';'} options: {listed}"
