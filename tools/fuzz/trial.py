"""One trial: a model is transformed, and whatever then happens to it happens to the plain model too.

Changes are lines of Python on a model ``m`` and an input ``x``, so that what is found can be read and run.
"""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import biofx
from biofx import BiofxError
from fuzz.setups import (
    KEEP_THE_FUNCTION,
    Setup,
    acting_factors,
    factors,
    is_computed,
    without_definition,
)
from fuzz.sides import Side, copied, differences

ACTS = (
    *("put(", "adapted(", ".forward", ".append(", ".insert(", ".pop(", "add_module", "switch()"),
    *(".bias =", ".num_groups", "register_forward"),
)
"""Changes that reach the output, whatever mechanisms there are."""
OTHER_STRUCTURE = (
    *ACTS,
    *("parametri", "prune", ".weight =", "register_parameter", "requires_grad", "_hook("),
)
"""Changes after which a model that is transformed anew may be rewritten elsewhere."""
EXACT = ("off", "rates of 1")
NextChange = Callable[[int, nn.Module], "str | None"]


@dataclass(frozen=True)
class Verdict:
    """How a trial ended."""

    outcome: str
    """``equal`` to the last change, ``refused`` by us, ``ended`` by the plain model itself, or ``failed``."""
    message: str = ""

    @property
    def sort(self) -> str:
        """What stays the same of a failure while its trial is made smaller."""
        return self.message.partition(":")[0]


class _Over(Exception):  # noqa: N818
    """There is nothing more to compare; says how it ended."""

    def __init__(self, outcome: str, message: str) -> None:
        super().__init__(message)
        self.verdict = Verdict(outcome, message)


class Trial:
    """A plain and a transformed model that go through the same changes."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        model, batch = setup.model()
        x = batch(4)
        self._pristine = copy.deepcopy(model)
        made = _ours("transform", lambda: setup.transform(model, x))
        self.plain = Side(copy.deepcopy(self._pristine), x, batch, lambda: copy.deepcopy(self._pristine))
        self.ours = Side(made, x, batch, lambda: setup.transform(copy.deepcopy(self._pristine), x))
        self._constants = self._held()
        self._exact = setup.config in EXACT
        self._structure_is_the_same = True
        self._calls_another = False
        self._is_as_made = True
        self._rounds = False
        """Whether a weight is computed with products of vectors, which round as memory is aligned, or was
        tied to another later, so that its gradients are summed in some order."""
        self._outputs: tuple[Any, Any] | None = None

    def change(self, text: str) -> None:
        """Make a change on both sides, and compare.

        Raises:
            _Over: one of them raised, or they differ.
        """
        self._structure_is_the_same &= not any(part in text for part in OTHER_STRUCTURE)
        start = {name: copied(p) for name, p in self.plain.model.named_parameters()}
        raised = self.plain.change(text)
        found = self.ours.change(text)
        if raised is not None and found is None:
            raise _Over("ended", f"the change: {type(raised).__name__}: {raised}")
        _judge("the change", raised, found)
        if self.setup.config in KEEP_THE_FUNCTION and (self._is_exact(text) or not _by_definition_only(text)):
            _refuse_differences("seen", self.plain.seen, self.ours.seen, 1e-5 * (not self._is_exact(text)))
        self._exact &= "rules=" not in text
        if "rules=" in text:
            self._constants = self._held()
        self._rounds |= "spectral_norm" in text or ").weight = at(" in text
        self._is_as_made &= "rules=" not in text
        self._calls_another |= ".forward" in text
        if not self._exact and _moves_weights(text):
            if self._calls_another and ("averaged" in text or "run_copied" in text):
                raise _Over(
                    "ended", "the forward of the instance calls the model that was copied, which went on"
                )
            keeps = self.setup.config in KEEP_THE_FUNCTION
            if keeps and (("attached=True" in text and "steps=1" in text) or "run_copied" in text):
                self._refuse_other_steps(start)
            self._let_the_plain_model_follow()
        self._refuse_changed_constants()
        self.compare(text)

    def compare(self, text: str = "") -> None:
        """Call both, and compare what they compute and leave behind."""
        keeps = self.setup.config in KEEP_THE_FUNCTION
        other = None if keeps or not self._structure_is_the_same else self._made_now()
        expected, raised = _tried(self.plain.call)
        found, found_raised = _tried(self.ours.call)
        _judge("the call", raised, found_raised)
        if keeps:
            pair = (expected, found) if self._exact else self._by_definition(expected, found)
            tolerance = 0 if self._exact and not self._rounds else 1e-5
            _refuse_differences("computed", *pair, tolerance)
        elif other is not None:
            anew, raised = _tried(other.call)
            if raised is not None:
                raise _Over("ended", f"made now it raises {type(raised).__name__}: {raised}")
            _refuse_differences("computed", anew, found, 1e-4)
            self._let_the_plain_model_follow()
        elif self._outputs is not None and self._must_act(text):
            plain_moved = any(differences(self._outputs[0], expected["output"], 1e-2))
            stays = not any(differences(self._outputs[1], found["output"], 0))
            if plain_moved and stays and not _is_silent(found["output"]):
                raise _Over("failed", "no effect and no word: the plain model's output changed")
        self._outputs = expected["output"], found["output"]

    def _made_now(self) -> Side:
        """The plain model as it is now, transformed now, with the same state."""
        x, state = self.plain.names["x"], self.ours.model.state_dict()
        made, raised = _tried(lambda: self.setup.transform(copy.deepcopy(self.plain.model), x))
        if isinstance(raised, BiofxError):
            raise _Over("ended", f"it cannot be transformed now: {raised}") from raised
        if raised is not None:
            raise _Over(
                "failed", f"transform raises a foreign {type(raised).__name__} now: {raised}"
            ) from raised
        shapes = [
            {name: getattr(value, "shape", None) for name, value in each.items()}
            for each in (made.state_dict(), state)
        ]
        if shapes[0] != shapes[1]:
            raise _Over("ended", "it would be rewritten elsewhere now")
        made.load_state_dict(state)
        return Side(made, x, None, self.ours.names["fresh"])

    def _by_definition(self, expected: dict[str, Any], found: dict[str, Any]) -> tuple[Any, Any]:
        """Multiply the plain model's gradients by the factors.

        Left out are those of weights that are computed, and those without a definition.
        """
        scaled = self.setup.config != "off"
        rates, unclear = factors(self.ours.model) if scaled else {}, without_definition(self.ours.model)
        for key in list(expected):
            name = key.removeprefix("gradient of ")
            if name == key:
                continue
            if is_computed(name) or name in unclear:
                expected.pop(key)
                found.pop(key, None)
            elif name in rates and expected[key] is not None:
                expected[key] = expected[key] * rates[name]
        return expected, found

    def _refuse_other_steps(self, start: dict[str, Tensor]) -> None:
        """Compare a step with its definition: as far as the plain model's, times the factor."""
        rates = acting_factors(self.ours.model)
        after = dict(self.ours.model.named_parameters())
        unclear = without_definition(self.ours.model)
        for name, parameter in self.plain.model.named_parameters():
            if name not in start or name not in after or name in unclear or is_computed(name):
                continue
            moved = (parameter.detach() - start[name]) * rates.get(name, torch.ones(()))
            _refuse_differences("step", start[name] + moved, copied(after[name]), 1e-4, name)

    def _let_the_plain_model_follow(self) -> None:
        """Go on from one state: what the mechanisms did to the weights is no difference from now on."""
        ours = {**dict(self.ours.model.named_parameters()), **dict(self.ours.model.named_buffers())}
        held = [*self.plain.model.named_parameters(), *self.plain.model.named_buffers()]
        with torch.no_grad():
            for name, value in held:
                if name not in ours or ours[name].shape != value.shape:
                    raise _Over("failed", f"state: {name} is not there, or of another shape")
                value.copy_(ours[name])

    def _held(self) -> dict[str, Tensor]:
        """Signs and rates, which nothing here may change, by the path that their layer had at first."""
        return {
            f"{state.path}: {name}": value.clone()
            for state in self.ours.model.modules()
            if isinstance(state, biofx.BioModule)
            for name, value in state.state_dict().items()
            if isinstance(value, Tensor) and ("sign" in name or "rate" in name)
        }

    def _refuse_changed_constants(self) -> None:
        held = self._held()
        for name, value in self._constants.items():
            if name in held and list(differences(value.float(), held[name].float(), 1e-2, name)):
                raise _Over("failed", f"signs or rates changed: {name}")

    def _must_act(self, text: str) -> bool:
        """Whether a change reaches the output, as it may not where signs or rules have silenced units."""
        return self._is_as_made and (
            any(part in text for part in ACTS)
            and self.setup.config.startswith("split")
            and self.setup.kind != "random"
        )

    def _is_exact(self, text: str) -> bool:
        return self._exact and not self._rounds and "deployed" not in text


def run(setup: Setup, next_change: NextChange, most: int) -> tuple[list[str], Verdict]:
    """Run a trial; return the changes that were made, and how it ended."""
    made: list[str] = []
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # where torch.fx prints errors
        warnings.simplefilter("ignore")
        try:
            trial = Trial(setup)
            trial.compare()
            for place in range(most):
                text = next_change(place, trial.plain.model)
                if text is not None:
                    made.append(text)
                    trial.change(text)
        except _Over as over:
            return made, over.verdict
    return made, Verdict("equal")


def run_again(setup: Setup, changes: Iterable[str]) -> Verdict:
    """Run a trial of given changes."""
    given = list(changes)
    return run(setup, lambda place, model: given[place], len(given))[1]


def _moves_weights(text: str) -> bool:
    return any(part in text for part in ("trained(", "run_copied(", "averaged", "swa_utils"))


def _is_silent(output: Any) -> bool:
    """Whether an output is 0 everywhere, which what multiplies it does not change."""
    parts = output if isinstance(output, (tuple, list)) else [output]
    return not any(bool(part.any()) for part in parts)


def _by_definition_only(text: str) -> bool:
    """Whether what a change shows depends on gradients, which factors change."""
    return "penalised" in text or _moves_weights(text)


def _tried(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return call(), None
    except Exception as error:
        return None, error


def _ours(what: str, call: Callable[[], Any]) -> Any:
    """Return what we make; what we raise ends the trial, anything else fails it."""
    made, raised = _tried(call)
    if raised is not None:
        _judge(what, None, raised)
    return made


def _judge(what: str, plain: Exception | None, ours: Exception | None) -> None:
    """End the trial if one of the two raised."""
    if isinstance(ours, BiofxError):
        raise _Over("refused", f"{what} ({type(ours).__name__}): {ours}") from ours
    if plain is not None and ours is not None:
        raise _Over("ended", f"{what}: {type(plain).__name__}: {plain}")
    if plain is not None:
        raise _Over("failed", f"{what} raises in the plain model alone ({type(plain).__name__}): {plain}")
    if ours is not None:
        raise _Over("failed", f"{what} raises a foreign {type(ours).__name__}: {ours}") from ours


def _refuse_differences(what: str, expected: Any, found: Any, tolerance: float, name: str = "") -> None:
    for difference in differences(expected, found, tolerance, name or what):
        raise _Over("failed", f"{what} differs: {difference}")
