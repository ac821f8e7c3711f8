"""What differs between two models, configs or checkpoints, in words."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from biofx.checkpoints.checkpoint import Checkpoint
from biofx.config import BioConfig
from biofx.errors import InputError
from biofx.graph.printing import format_graph
from biofx.rewriting.plain_passes import config_to_plain


def differences(one: Any, other: Any) -> list[str]:
    """Return what differs, a line each; none where nothing does.

    Args:
        one: a :class:`biofx.BioConfig`, a :class:`biofx.checkpoints.Checkpoint` or a model.
        other: another of the same kind.

    Raises:
        InputError: they are of different kinds, or of none of these.

    >>> differences(BioConfig(seed=1), BioConfig(seed=2, weight_splitting_Gamma=2))
    ['weight_splitting_Gamma: 0 → 2', 'seed: 1 → 2']
    """
    if isinstance(one, BioConfig) and isinstance(other, BioConfig):
        return list(_of_configs(one, other))
    if isinstance(one, Checkpoint) and isinstance(other, Checkpoint):
        return list(_of_checkpoints(one, other))
    if isinstance(one, nn.Module) and isinstance(other, nn.Module):
        return list(_of_models(one, other))
    names = [type(entry).__name__ for entry in (one, other)]
    raise InputError(
        f"expected two configs, two checkpoints or two models, found a {names[0]} and a {names[1]}"
    )


def _of_configs(one: BioConfig, other: BioConfig) -> Iterator[str]:
    fields = [field.name for field in dataclasses.fields(BioConfig) if field.name != "overrides"]
    for name in fields:
        yield from _of_values(name, getattr(one, name), getattr(other, name))
    yield from _of_lists(
        "override", *([_override(entry) for entry in each.overrides] for each in (one, other))
    )


def _override(entry: Any) -> str:
    selector, options = dataclasses.astuple(entry)
    return f"{selector}: {', '.join(f'{name}={value!r}' for name, value in dict(options).items())}"


def _of_models(one: nn.Module, other: nn.Module) -> Iterator[str]:
    yield from _of_values("class", type(one).__name__, type(other).__name__)
    yield from _of_mappings("module", *(_module_classes(model) for model in (one, other)))
    if isinstance(one, GraphModule) and isinstance(other, GraphModule):
        yield from _of_lists("graph", *(format_graph(model).splitlines() for model in (one, other)))
    yield from _of_states(one.state_dict(), other.state_dict())
    frozen = ({name: p.requires_grad for name, p in model.named_parameters()} for model in (one, other))
    first, second = frozen
    for name in first:
        if first[name] != second.get(name, first[name]):
            yield f"{name}: {_trained(first[name])} → {_trained(second[name])}"


def _module_classes(model: nn.Module) -> dict[str, str]:
    return {path: _described(module) for path, module in model.named_modules() if path}


def _described(module: nn.Module) -> str:
    options = "" if isinstance(module, GraphModule) else module.extra_repr()
    return f"{type(module).__name__}({options})" if options else type(module).__name__


def _trained(is_trained: bool) -> str:
    return "trained" if is_trained else "frozen"


def _of_checkpoints(one: Checkpoint, other: Checkpoint) -> Iterator[str]:
    for name in ("model", "biofx", "torch"):
        label = "made from a" if name == "model" else f"version of {name}"
        yield from _of_values(label, getattr(one.record, name), getattr(other.record, name))
    pipelines = [[step.pipeline for step in saved.record.steps] for saved in (one, other)]
    yield from _of_lists("passes", *pipelines)
    yield from _of_lists("graph", *(list(saved.record.graph) for saved in (one, other)))
    plain = config_to_plain(BioConfig())
    for path in one.rules:
        if path in other.rules:
            options = [{**plain, **saved.rules[path]} for saved in (one, other)]
            for name in options[0]:
                yield from _of_values(f"rules of {path}: {name}", *(each.get(name) for each in options))
    yield from _of_states(one.model, other.model)
    yield from _of_values("optimizers", len(one.optimizers), len(other.optimizers))
    for number, (first, second) in enumerate(zip(one.optimizers, other.optimizers, strict=False)):
        yield from _of_states(_flat(first), _flat(second), f"optimizer {number}, ")
    yield from _of_values("attachments", len(one.plasticity), len(other.plasticity))
    for number, (first, second) in enumerate(zip(one.plasticity, other.plasticity, strict=False)):
        yield from _of_states(_flat(first), _flat(second), f"attachment {number}, ")
    yield from _of_states(_flat(one.extra), _flat(other.extra), "extra ")


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Return what nested values contain, by its place."""
    if isinstance(value, Mapping):
        entries = [(str(name), entry) for name, entry in value.items()]
    elif isinstance(value, (list, tuple)):
        entries = [(str(number), entry) for number, entry in enumerate(value)]
    else:
        return {path: value}
    return {
        place: inner
        for name, entry in entries
        for place, inner in _flat(entry, f"{path}.{name}" if path else name).items()
    }


# of two values


def _of_states(one: Mapping[str, Any], other: Mapping[str, Any], of: str = "") -> Iterator[str]:
    yield from (f"{of}{name}: only in A" for name in one if name not in other)
    yield from (f"{of}{name}: only in B" for name in other if name not in one)
    for name in one:
        if name in other:
            yield from _of_values(f"{of}{name}", one[name], other[name])


def _of_mappings(what: str, one: Mapping[str, str], other: Mapping[str, str]) -> Iterator[str]:
    yield from (f"{what} {name}: only in A, {one[name]}" for name in one if name not in other)
    yield from (f"{what} {name}: only in B, {other[name]}" for name in other if name not in one)
    for name in one:
        if one[name] != other.get(name, one[name]):
            yield f"{what} {name}: {one[name]} → {other[name]}"


def _of_values(name: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        yield from _of_tensors(name, one, other)
    elif type(one) is not type(other) or one != other:
        yield f"{name}: {_short(one)} → {_short(other)}"


def _of_tensors(name: str, one: Tensor, other: Tensor) -> Iterator[str]:
    if one.shape != other.shape or one.dtype != other.dtype:
        yield f"{name}: {_kind(one)} → {_kind(other)}"
        return
    first, second = (entry.detach().cpu() for entry in (one, other))
    unequal = (first != second) & ~((first != first) & (second != second))  # NaN is as NaN
    count = int(unequal.sum())
    if count:
        size = torch.complex128 if first.is_complex() else torch.float64
        apart = (first.to(size) - second.to(size)).abs()[unequal]
        undefined = int(apart.isnan().sum())
        told = f"{name}: {count} of {first.numel()} numbers differ"
        told += f", by at most {apart[~apart.isnan()].max().item():.2g}" if undefined < count else ""
        yield told + (f", of {undefined} one alone is NaN" if undefined else "")


def _of_lists(what: str, one: list[str], other: list[str]) -> Iterator[str]:
    for line in difflib.unified_diff(one, other, lineterm="", n=0):
        if line[:1] in "+-" and not line.startswith(("---", "+++")):
            yield f"{what}: only in {'A' if line[0] == '-' else 'B'}: {line[1:].strip()}"


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"


def _short(value: Any) -> str:
    text = _kind(value) if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
