"""Load rates that were saved in one type into a model that keeps them in another.

How a model was made is compared but for the type of its rates, and the saved rates are converted.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from biofx.errors import CheckpointError, PlasticityError
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.saved_state import RATE_BUFFERS, Held, factors_of, form_of
from biofx.rewriting.record import TransformRecord

_FIELD, _OPTION, _PASS = "fuzzy_lr_dtype", "dtype", "scale-gradients"
_READ = re.compile(r"\S+ = self\.\S*bio_mod\S*\.fuzzy_learning_rate_parameters")
_SCALED = re.compile(r"(\S+) = scale_gradient(_by_seed)?\((\w+).*\)")


def record_as(record: TransformRecord, dtype: str) -> TransformRecord:
    """Return the record of a model that keeps all its rates in one type, but for the graph and its text."""
    steps = tuple(
        dataclasses.replace(
            step,
            passes=_passes_as(step.passes, dtype),
            config=None if step.config is None else _with_option(step.config, _FIELD, dtype),
        )
        for step in record.steps
    )
    return dataclasses.replace(record, steps=steps)


def rules_as(options: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the options of a weight's rules where its rates are kept in another type."""
    return {**options, _FIELD: dtype}


def without_rate_types(record: TransformRecord) -> TransformRecord:
    """Return a record in which nothing says in which type rates are kept, to compare it with another."""
    graph = [_SCALED.sub(r"\1 = scale_gradient(\3)", line) for line in record.graph if not _READ.match(line)]
    return dataclasses.replace(record_as(record, ""), graph=tuple(graph))


def _passes_as(plain: Mapping[str, Any], dtype: str) -> Mapping[str, Any]:
    if "group" in plain:
        return {**plain, "group": [_passes_as(member, dtype) for member in plain["group"]]}
    if plain.get("pass") != _PASS:
        return plain
    return _with_option({**plain, "options": {**plain["options"], _OPTION: dtype}}, _OPTION, dtype)


def _with_option(plain: Mapping[str, Any], name: str, value: str) -> dict[str, Any]:
    """Return plain values with an option replaced, on top and in every override that has it."""
    made = {**plain, name: value} if name in plain else dict(plain)
    if "overrides" in plain:
        made["overrides"] = [
            {**entry, "options": {**entry["options"], name: value}} if name in entry["options"] else entry
            for entry in plain["overrides"]
        ]
    return made


def convert_rates(model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state whose rates have the types in which a model keeps its own.

    Where that rounds them, a warning says by how much.

    Raises:
        CheckpointError: they cannot be kept so.
    """
    made = dict(saved)
    rounded: dict[str, float] = {}
    for path, owner in model.named_modules(remove_duplicate=False):
        if not isinstance(owner, BioModule) or not owner.is_linked or owner.parameter is None:
            continue
        prefix = f"{path}." if path else ""
        given = {name: made[prefix + name] for name in owner._buffers if prefix + name in made}
        before = {name: given.get(name) for name in RATE_BUFFERS}
        if owner.is_drawn and form_of(before) is None:
            raise CheckpointError(f"model: {owner.path!r}: expected learning-rate factors, found none")
        try:
            kept = owner.with_own_form(given)
        except PlasticityError as error:
            raise CheckpointError(f"model: {owner.path!r}: {error}") from error
        after = {name: kept.get(name) for name in RATE_BUFFERS}
        if form_of(before) == form_of(after):
            continue
        for name in given:
            del made[prefix + name]
        made.update({prefix + name: value for name, value in kept.items()})
        if changed := _difference(owner, before, after):
            rounded[owner.path] = changed
    if rounded:
        warnings.warn(
            f"the learning-rate factors of {len(rounded)} weights differ from the saved ones by up to "
            f"{max(rounded.values()):.2g} ({max(rounded, key=rounded.__getitem__)}): they were saved in "
            "another type than this model keeps them in; to go on with the same factors, load into a model "
            "with the fuzzy_lr_dtype of the saved one",
            UserWarning,
            stacklevel=4,
        )
    return made


def _difference(owner: BioModule, before: Held, after: Held) -> float:
    """Return by how much the factors in two forms differ at most."""
    weight = owner.weight
    found = [factors_of(held, weight.shape, weight.device) for held in (before, after)]
    first, second = (torch.ones(1) if factors is None else factors.float().cpu() for factors in found)
    return float((first - second).abs().max())
