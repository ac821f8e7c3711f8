"""Whether a captured model does what the model does, and how much of it can be rewritten.

What is compared is a sequence of two calls with their gradients: outputs, gradients of all parameters and
buffers, to the bit, in training and in evaluation, on the example, on fresh values, and on others of another
size. Only where the model by itself is not the same twice, it is compared to what it is then.
"""

from __future__ import annotations

import copy
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import biofx
from biofx.layers.sites import find_sites
from biofx.layers.weight_site import WeightSite

_SIZES = (2, 3, 4)
"""The first is recorded; 3 is a fresh batch of another size, 4 one of another length too if that can be."""

_SEVERITY = ("equal", "guarded", "fails", "DIFFERENT")

Example = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass
class Outcome:
    """What became of one model."""

    name: str
    verdict: str
    """``equal``; ``refused`` before anything is captured; ``guarded`` if a call ends in an error of ours that
    says why; ``fails`` if in another; ``DIFFERENT`` if what it gives is, without a word; ``untrained`` if a
    step with everything on fails; ``too slow``, ``DIED``, ``not built``."""
    note: str = ""
    in_training: bool = True
    """Whether it is equal in training."""
    in_evaluation: bool = True
    """Whether it is equal in evaluation."""
    sites: float = 0.0
    """Fraction of the elements of matrices that belong to a weight site, dimensionless."""
    visible: float = 0.0
    """Fraction of the elements of all parameters that are read in a graph, dimensionless."""
    scaled: float = 0.0
    """Fraction of the elements of synapses whose gradient is scaled with everything on, dimensionless."""
    parameters: int = 0
    graphs: int = 0
    kept: int = 0
    cost: float = float("nan")
    """Time of ``capture`` over that of ``symbolic_trace`` and ``deepcopy``; NaN where that fails."""


def compare(
    name: str, model: nn.Module, example: Example, *, recorded: bool, sizes: Sequence[int] = ()
) -> Outcome:
    """Capture a model and compare, at the sizes given or at those that make sense; see :class:`Outcome`."""
    options: dict[str, Any] = {"example_inputs": example(2)} if recorded else {}
    try:
        captured = biofx.capture(model, **options)
    except biofx.BiofxError as error:
        return Outcome(name, "refused", str(error))
    outcome = Outcome(name, "equal", parameters=sum(p.numel() for p in model.parameters()))
    outcome.graphs = 1 + len(vars(captured).get("region_paths", ()))
    outcome.kept = len(vars(captured).get("graph_breaks", {}))
    for training in (True, False):
        for size in sizes or _sizes(example):
            given = example(size)
            verdict, note = _difference(model, captured, given, training)
            if verdict == "equal":
                continue
            if training:
                outcome.in_training = False
            else:
                outcome.in_evaluation = False
            if _SEVERITY.index(verdict) > _SEVERITY.index(outcome.verdict):
                outcome.verdict = verdict
                outcome.note = f"{'train' if training else 'eval'}, size {size}: {note}"
    if outcome.verdict != "equal":
        return outcome
    try:
        _try_everything(captured, example(2), outcome)
    except Exception as error:
        outcome.verdict = "untrained"
        outcome.note = f"with everything on: {type(error).__name__}: {error}"
    return outcome


def _sizes(example: Example) -> list[int]:
    """Return the sizes to try; the third only where more than the batch is of another size in it."""
    found: dict[Any, int] = {}
    for size in _SIZES:
        leaves = _tensors(example(size))
        found.setdefault((size == _SIZES[0], *(leaf.shape[1:] for leaf in leaves)), size)
    return list(found.values())


def _difference(model: nn.Module, captured: nn.Module, given: Any, training: bool) -> tuple[str, str]:
    """Return the verdict on one mode and size, and what differs."""
    reference, other = _copied(model, training), _copied(captured, training)
    (expected, failed), (found, fails) = _tried(reference, given), _tried(other, given)
    if failed is not None:
        alike = fails is not None and (type(fails) is type(failed) or isinstance(fails, biofx.BiofxError))
        return ("equal", "") if alike else ("fails", f"{fails or 'no error'} instead of {failed!r}")
    if isinstance(fails, biofx.BiofxError):
        return "guarded", str(fails)
    if fails is not None:
        return "fails", repr(fails)
    note = _apart(found, expected)
    if note and _apart(_tried(_copied(model, training), given)[0], expected):
        return "equal", ""  # the model itself is not the same twice
    return ("DIFFERENT", note) if note else ("equal", "")


def _copied(model: nn.Module, training: bool) -> nn.Module:
    """Return a copy in a mode; some models have a ``train`` of their own, which takes and returns nothing."""
    model = copy.deepcopy(model)
    model.train() if training else model.eval()
    return model


def _apart(found: Any, expected: Any) -> str:
    try:
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    except AssertionError as error:
        return str(error)
    return ""


def _tried(model: nn.Module, given: Any) -> tuple[Any, Exception | None]:
    """Return what a run gives, and what it raises."""
    try:
        return _run(model, given), None
    except Exception as error:
        return None, error


def _run(model: nn.Module, given: Any) -> tuple[Any, ...]:
    args, kwargs = copy.deepcopy(given)
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    outputs = [model(*args, **kwargs) for _ in range(2)]
    leaves = _tensors(outputs)
    total = sum((leaf.float() ** 2).mean() for leaf in leaves if leaf.requires_grad)
    if isinstance(total, Tensor):
        total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())
    numbers = [torch.tensor(leaf) for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, (int, float))]
    return {type(outputs[0]).__name__: leaves + numbers}, gradients, buffers


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors in an output, those in objects of classes of the model's own too."""
    found = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif hasattr(leaf, "__dict__") and not callable(leaf):
            found += _tensors(list(vars(leaf).values()))
    return found


def _try_everything(model: nn.Module, given: Any, outcome: Outcome) -> None:
    config = biofx.BioConfig(fuzzy_learning_rate_factor_nu=0.2, apply_dales_principle=True)
    bio_model, report = biofx.transform(model, config)
    sites = find_sites(bio_model)
    seen = {id(site.parameter): site.parameter.numel() for site in sites.found}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    outcome.sites = sum(seen.values()) / max(1, matrices)
    outcome.scaled = _scaled(bio_model, [*sites.found, *sites.reads])
    outcome.visible = report.coverage.visible / max(1, report.coverage.total)  # type: ignore[union-attr]
    bio_model.train()
    args, kwargs = given
    optimizer = torch.optim.SGD(bio_model.parameters(), 1e-3)
    leaves = _tensors(bio_model(*args, **kwargs))
    total = sum((leaf.float() ** 2).mean() for leaf in leaves if leaf.requires_grad)
    total.backward()  # type: ignore[union-attr]
    optimizer.step()


_NO_SYNAPSE = re.compile(r"bias|pos|cls|token|embedding|(^|\.)pe$|norm|gamma")


def _scaled(model: nn.Module, sites: Sequence[WeightSite]) -> float:
    """Return the fraction of the elements of synapses whose gradient is scaled.

    A synapse is an element of a trainable parameter with two axes longer than 1, unless the name says that it
    is something else, or the parameter is the table of an embedding.
    """
    tables = {id(inner.weight) for inner in model.modules() if isinstance(inner, nn.Embedding)}
    scaled = {id(site.parameter) for site in sites if site.is_scaled}
    computed = {site.layer for site in sites if site.is_scaled and site.is_computed}
    total = done = 0
    for path, parameter in model.named_parameters():
        many = sum(length > 1 for length in parameter.shape) > 1
        if not (many and parameter.requires_grad) or id(parameter) in tables or _NO_SYNAPSE.search(path):
            continue
        total += parameter.numel()
        if id(parameter) in scaled or path.partition(".parametrizations.")[0] in computed:
            done += parameter.numel()
    return done / total if total else 1.0


def cost(model: nn.Module) -> float:
    """Return the least time of a capture over that of plain tracing and copying, interleaved; or NaN."""
    times: list[list[float]] = [[], []]
    for _ in range(4):
        try:
            start = time.process_time()
            torch.fx.symbolic_trace(copy.deepcopy(model))
            middle = time.process_time()
            biofx.capture(model)
            times[0].append(middle - start)
            times[1].append(time.process_time() - middle)
        except Exception:
            return float("nan")
    return min(times[1]) / min(times[0])
