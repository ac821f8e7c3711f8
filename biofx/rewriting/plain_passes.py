"""Passes as plain values and back, with every option spelt out.

A group is ``{"group": [...]}``, a pass ``{"pass": name, "options": {...}}``, both with ``only``, ``exclude``,
``enabled`` and ``overrides`` where given. Selectors are as :mod:`biofx.plain_selectors` writes them. A
callable is ``{"callable": its name}``, or ``{"unnamed": …}`` where it has no name that a file may carry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from biofx.callables import callable_from_text, callable_to_text, registered_activations
from biofx.config import BioConfig
from biofx.errors import BiofxError, CheckpointError, OptionError
from biofx.plain_selectors import selector_from_plain, selector_to_plain
from biofx.rewriting.pass_base import Pass
from biofx.rewriting.pipeline import Pipeline
from biofx.rewriting.registry import available_passes, find_pass
from biofx.select import Override

_SHARED = ("only", "exclude", "enabled", "overrides")


def pass_to_plain(entry: Pass) -> dict[str, Any]:
    """Return a pass, or a pipeline, in plain values."""
    if isinstance(entry, Pipeline):
        made: dict[str, Any] = {"group": [pass_to_plain(member) for member in entry.passes]}
    else:
        options = {
            name: value_to_plain(getattr(entry, name)) for name in entry.option_names() if name not in _SHARED
        }
        made = {"pass": entry.name, "options": options}
    made |= {
        side: selector_to_plain(getattr(entry, side))
        for side in ("only", "exclude")
        if getattr(entry, side) is not None
    }
    if entry.overrides:
        made["overrides"] = _overrides_to_plain(entry.overrides)
    return made if entry.enabled else {**made, "enabled": False}


def pass_from_plain(plain: Mapping[str, Any]) -> Any:
    """Return the pass that :func:`pass_to_plain` wrote down.

    Raises:
        CheckpointError: it names an unknown pass, has a callable that a file cannot name, or is malformed.
    """
    try:
        shared: dict[str, Any] = {
            side: selector_from_plain(plain[side]) for side in ("only", "exclude") if side in plain
        }
        if "enabled" in plain:
            shared["enabled"] = plain["enabled"]
        if "group" in plain:
            return Pipeline(tuple(pass_from_plain(member) for member in plain["group"]), **shared)
        overrides = _overrides_from_plain(plain.get("overrides", ()))
        options = {name: value_from_plain(value) for name, value in plain["options"].items()}
        return find_pass(plain["pass"]).from_options({**options, **shared, "overrides": overrides})
    except CheckpointError:
        raise
    except BiofxError as error:
        raise CheckpointError(
            f"a pass of the checkpoint cannot be made again: {error}. Register the pass, or transform the "
            "model as it was and load into the result"
        ) from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"expected a pass in plain values, found something else: {error!r}") from error


def with_new_options(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return a pass in plain values, or a pipeline, as files of this version have it.

    Options that there were not yet when a file was written have their defaults.
    """
    if "group" in plain:
        return {**plain, "group": [with_new_options(member) for member in plain["group"]]}
    cls = available_passes().get(str(plain.get("pass")))
    fields = () if cls is None else dataclasses.fields(cls)
    defaults = {
        field.name: value_to_plain(field.default)
        for field in fields
        if field.init and field.name not in _SHARED and field.default is not dataclasses.MISSING
    }
    return {**plain, "options": {**defaults, **dict(plain.get("options", {}))}}


def config_to_plain(config: BioConfig) -> dict[str, Any]:
    """Return a config in plain values."""
    fields = {name: value_to_plain(value) for name, value in config.to_dict().items() if name != "overrides"}
    return {**fields, "overrides": _overrides_to_plain(config.overrides)}


def config_from_plain(plain: Mapping[str, Any]) -> BioConfig:
    """Return the config that :func:`config_to_plain` wrote down.

    Raises:
        CheckpointError: it has an unknown field or a bad value, or a callable that a file cannot name.
    """
    try:
        fields = {name: value_from_plain(value) for name, value in plain.items() if name != "overrides"}
        return BioConfig(**fields, overrides=_overrides_from_plain(plain.get("overrides", ())))
    except CheckpointError:
        raise
    except (BiofxError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"a config of the checkpoint cannot be made again: {error}") from error


def _overrides_to_plain(overrides: Iterable[Override]) -> list[dict[str, Any]]:
    return [
        {
            "selector": selector_to_plain(override.selector),
            "options": {name: value_to_plain(value) for name, value in override.options},
        }
        for override in overrides
    ]


def _overrides_from_plain(plain: Iterable[Mapping[str, Any]]) -> tuple[Override, ...]:
    return tuple(
        Override(
            selector_from_plain(entry["selector"]),
            tuple((name, value_from_plain(value)) for name, value in entry["options"].items()),
        )
        for entry in plain
    )


def value_to_plain(value: Any) -> Any:
    """Return one option's value in plain values."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [value_to_plain(entry) for entry in value]
    if callable(value):
        try:
            return {"callable": callable_to_text(value)}
        except OptionError:
            pass
    return {"unnamed": getattr(value, "__qualname__", type(value).__name__)}


def value_from_plain(plain: Any) -> Any:
    """Return an option's value.

    Raises:
        CheckpointError: it was something that a file cannot contain, such as a function of the user.
    """
    if isinstance(plain, Mapping) and set(plain) == {"callable"}:
        return callable_from_text(plain["callable"])
    if isinstance(plain, Mapping):
        raise CheckpointError(
            f"a checkpoint carries no code, and cannot say what {plain.get('unnamed')!r} is; transform the "
            "model as it was, with that in it, and load into the result: "
            "biofx.load(path, biofx.transform(model, config).graph_module)"
        )
    return tuple(value_from_plain(entry) for entry in plain) if isinstance(plain, list) else plain


def same_options(one: Any, other: Any) -> bool:
    """Whether two plain values mean the same, as far as is known.

    A function that a file could name when it was saved may have no name for it now, or the other way round.
    One of torch's is the same if it is called so. What a name meant that is registered elsewhere only the
    graph can tell.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if {*one, *other} == {"callable", "unnamed"} and len(one) == len(other) == 1:
            both = {**one, **other}
            return _called(str(both["callable"])) in (None, str(both["unnamed"]).rpartition(".")[2])
        return one.keys() == other.keys() and all(same_options(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_options, one, other))
    return bool(one == other)


def _called(name: str) -> str | None:
    """Return what the function that a text names calls itself, None where that is not known here."""
    if name.startswith("torch."):
        return name.rpartition(".")[2]
    known = registered_activations().get(name)
    own = getattr(known, "__qualname__", type(known).__name__)
    return None if known is None else own.rpartition(".")[2]
