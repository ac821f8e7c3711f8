"""Plasticity bound to an optimizer: its step hooks, its state, and copies of a run."""

from __future__ import annotations

import copy
import sys
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from types import FrameType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from biofx.errors import PlasticityError
from biofx.plasticity.agreement import Ranks
from biofx.plasticity.binding import Binding, Bound
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.consolidated_state import OF_TASKS, RULES
from biofx.plasticity.lent_memory import LentMemory
from biofx.plasticity.optimizer_step import Observer, OptimizerStep
from biofx.plasticity.optimizers import unscale_or_skip
from biofx.plasticity.rule import Rule
from biofx.plasticity.schedule import Entry, Schedule
from biofx.plasticity.tasks import Loss, begin_task


class Attachment:
    """Plasticity bound to an optimizer; made by :func:`biofx.attach`.

    ``copy.deepcopy`` and pickling of model, optimizer and attachment together give a run that continues by
    itself, as the original would.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        binding: Binding,
        schedule: Schedule,
        observers: list[Observer],
        ranks: Ranks | None = None,
    ) -> None:
        self.steps = 0
        """Optimizer steps so far, a count."""
        self._schedule = schedule
        self._begun: set[str] = set()
        self._memory = LentMemory()
        self.is_copy = False
        """Whether it was copied with its model and optimizer."""
        self._binding, self._observers, self._ranks = binding, observers, ranks
        self._are_watching = True
        self._refer_to(model, optimizer)
        self._kept: tuple[Any, ...] = (model, optimizer)
        self._hooks: list[Any] = []
        self._listen(optimizer)
        self._await_gradients()
        _carry(optimizer, self)

    def __repr__(self) -> str:
        optimizer, model = self._optimizer_ref(), self._model_ref()
        if optimizer is None or model is None:
            return f"<{type(self).__name__} of a run that is gone>"
        told = f"{type(model).__name__} under {type(optimizer).__name__}, {self.steps} steps"
        shown = [*map(str, self.rules[:_SHOWN])]
        shown += [f"and {len(self.rules) - _SHOWN} more"] if len(self.rules) > _SHOWN else []
        rules = ", ".join(shown) or "no rules"
        return f"<{type(self).__name__} of {told}: {rules}{'' if self._hooks else ' (detached)'}>"

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The entries of the schedule."""
        return self._schedule.rules

    @property
    def modes(self) -> dict[str, str]:
        """What factors multiply, ``"gradient"`` or ``"update"``, by the path of each weight stepped."""
        bound = self._binding.bind(self._optimizer)
        return {path: weight.way.value for path, weight in bound.items() if weight.weight.requires_grad}

    @property
    def left_alone(self) -> dict[str, str]:
        """Weights that this attachment does not act on at present, with the reason, by path."""
        return self._binding.left_alone(self._optimizer)

    def detach(self) -> None:
        """Let the optimizer step as if nothing had been attached; weights and factors stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        optimizer = self._optimizer_ref()
        if optimizer is not None:
            self._await_gradients(stops=True)
        self._binding.release()
        if optimizer is not None:
            _let_go(optimizer, self)

    def begin_task(self, batches: Iterable[Any] | None = None, loss: Loss | None = None) -> None:
        """Begin a task: what was learned so far becomes important, for rules of consolidation.

        To be called before the first step, and then whenever the task changes; no step is taken without.
        What importance follows from is in :mod:`biofx.plasticity.consolidation`: ``synaptic_intelligence``
        takes it from the steps of the task that ends. ``elastic_consolidation`` takes the mean, over the
        samples of the batches, of the squared gradient of -log p: of the given label by ``loss`` (the
        empirical Fisher information), or without a loss of a label that is drawn from the model's output,
        taken as logits (its definition). Without batches it takes the squared gradients of the steps, which
        are those of means over batches and so smaller. ``memory_aware`` needs batches.

        Samples go through the model one by one, in evaluation; gradients, random states and modes stay.

        Args:
            batches: of the task that ends, tensors of inputs ``(samples, *)`` or pairs of inputs and targets
                ``(samples, *)``. Replicas of a DDP run give each their own; sharded models all the same.
            loss: from the output for a sample and its target, both with an axis of 1 in front, to its -log p.

        Raises:
            PlasticityError: no scheduled rule needs it, or something that it needs is missing or of another
                kind; nothing has been changed.
            NonFiniteWeightError: importance has become NaN or infinite; nothing has been changed.
        """
        states = [state for state in self._stepped().values() if self._is_consolidated(state)]
        with self._schedule.in_force(states):
            begin_task(self._model, states, self._schedule.names, batches, loss, self._ranks)

    def _is_consolidated(self, state: BioModule) -> bool:
        """Whether a rule that consolidates at the end of a task is scheduled for a weight."""
        return any(self._schedule.has(name, state) for name in OF_TASKS)

    # saved and loaded

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs to continue, besides the state dicts of model and optimizer."""
        rules = self._schedule.to_plain()
        return {
            "version": max(map(_version_of, rules), default=1),
            "steps": self.steps,
            "rules": rules,
            "memory": {path: state.memory.to_plain() for path, state in self._stepped().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another attachment stopped; weights that the state does not name keep their memory.

        Raises:
            PlasticityError: it is of another version, of another schedule, or of weights that differ from
                those that the optimizer steps; nothing has been changed.
        """
        if state.get("version") not in _VERSIONS:
            found = state.get("version")
            raise PlasticityError(
                f"expected the state of an attachment, version 1 or 2, found version {found!r}"
            )
        entries = [Entry.from_plain(entry) for entry in state["rules"]]
        if not self._schedule.is_like(entries):
            own, other = (_shown(each) for each in (self._schedule.entries, entries))
            if own == other:
                other += ", on other weights"
            raise PlasticityError(f"expected a state of the same schedule, {own}, found {other}")
        states, saved = self._stepped(), state.get("memory", {})
        if not isinstance(saved, Mapping):
            raise PlasticityError(f"memory: expected a dict by the paths of weights, found {saved!r}")
        for path, entry in saved.items():
            if path not in states:
                raise PlasticityError(
                    f"memory: found that of {path!r}, which the optimizer does not step here"
                )
            try:
                states[path].memory.check(entry, states[path].units, states[path].weight.shape)
            except PlasticityError as error:
                raise PlasticityError(f"memory of {path!r}: {error}") from error
        for path, entry in saved.items():
            states[path].memory.restore(entry, states[path].weight.device)
        self.steps = int(state["steps"])
        self._begun = set()
        self._await_gradients()

    def _stepped(self) -> dict[str, BioModule]:
        """Return the states of the weights that the optimizer holds, by path."""
        return {path: weight.state for path, weight in self._binding.bind(self._optimizer).items()}

    # copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        if _is_copied_alone(self):
            raise _without_its_run()
        made = object.__new__(type(self))
        memo[id(self)] = made
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        if self._ranks is not None:
            raise PlasticityError(
                "an attachment of a distributed run cannot be copied, for its ranks have to agree; write the "
                "run with biofx.save and attach to what biofx.load gives"
            )
        passing = (
            "_memory",
            "_model_ref",
            "_optimizer_ref",
            "_kept",
            "_hooks",
            "_running",
            "_step",
            "_are_watching",
        )
        kept = {name: value for name, value in vars(self).items() if name not in passing}
        return {**kept, "_is_attached": bool(self._hooks), "_run": (self._model, self._optimizer)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        model, optimizer = state.pop("_run")
        is_attached = state.pop("_is_attached")
        vars(self).update(state)
        self._refer_to(model, optimizer)
        self._kept = ()  # the owner of the copies keeps them: without these, nothing is left of the run
        self._are_watching = False
        self._hooks = []
        self._memory = LentMemory()
        self.is_copy = True
        if is_attached:
            self._listen(optimizer)

    def _refer_to(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model_ref, self._optimizer_ref = weakref.ref(model), weakref.ref(optimizer)
        self._running: FrameType | None = None
        self._step: OptimizerStep | None = None

    @property
    def _optimizer(self) -> Optimizer:
        optimizer = self._optimizer_ref()
        if optimizer is None:
            raise _without_its_run()
        return optimizer

    @property
    def _model(self) -> nn.Module:
        model = self._model_ref()
        if model is None:
            raise _without_its_run()
        return model

    # hooks

    def _listen(self, optimizer: Optimizer) -> None:
        for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            vars(optimizer).setdefault(name, OrderedDict())  # of a copy that is still being made
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Prepare the weights, at once or when the closure has computed the gradients."""
        frame = sys._getframe(1)
        if self._running is not None and _is_within(frame, self._running):
            return None  # the step of a subclass has called that of its parent
        self._running, self._step = frame, None
        if not self._kept:
            self._kept = (self._model, optimizer)
        if unscale_or_skip(optimizer):
            self._await_gradients()
            return None
        arguments = list(args[1:] if args and args[0] is optimizer else args)
        closure = arguments[0] if arguments else kwargs.get("closure")
        if closure is None:
            self._prepare(optimizer)
            return None

        def closure_then_rules() -> Any:
            if self._step is not None:
                raise PlasticityError(
                    f"{type(optimizer).__name__} evaluates the model several times a step, so no update "
                    "belongs to one gradient and factors have no meaning; use another optimizer"
                )
            result = closure()
            self._prepare(optimizer)
            return result

        rest = args[:1] if args and args[0] is optimizer else ()
        return rest, {**kwargs, "closure": closure_then_rules}

    def _prepare(self, optimizer: Optimizer) -> None:
        bound = self._binding.bind(optimizer)
        if not self._are_watching:  # copied observers, which do not know the copied model yet
            watch(self._observers, self._model)
            self._are_watching = True
        watched = any(
            not hasattr(observer, "is_due") or observer.is_due(self.steps) for observer in self._observers
        )
        self._refuse_without_task(bound)
        step = OptimizerStep(self.steps, self._schedule, self._ranks, self._memory, watched=watched)
        step.prepare(optimizer, bound)
        self._step = step

    def _refuse_without_task(self, bound: Mapping[str, Bound]) -> None:
        """Refuse a step of weights that are to be consolidated and of which no task has begun."""
        methods = {RULES[name]: name for name in self._schedule.names if name in OF_TASKS}
        for path in bound.keys() - self._begun if methods else ():
            state = bound[path].state
            method = state.config.consolidation
            waits = state.task_counts is not None and not state.has_begun_task
            if waits and self._is_consolidated(state):
                raise PlasticityError(
                    f"{methods[method]} consolidates {path!r} at the end of each task: expected "
                    "plasticity.begin_task() before the first step, and whenever the task changes, found no "
                    "call of it"
                )
            self._begun.add(path)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finish the step that :meth:`_before_step` has prepared, unless it is skipped."""
        if sys._getframe(1) is not self._running:
            return
        step, self._running, self._step = self._step, None, None
        if step is None:
            return
        step.finish(optimizer)
        for observer in self._observers:
            observer(self.steps, step.layers)
        self.steps += 1
        self._await_gradients()

    def _await_gradients(self, *, stops: bool = False) -> None:
        """Let the weights whose connections grow by gradient at the next step collect it, and no others."""
        rule = "rejuvenate_weights"
        if rule not in self._schedule.names:
            return
        if any(state.grows_by_gradient for state in self._binding.states.values()):
            due = [] if stops else self._schedule.due(self.steps).get(rule, [])
            for state in self._stepped().values():
                state.await_gradient(any(entry.covers(state) for entry in due))


_SHOWN = 10
"""Entries of a schedule in a text that is to be short."""
_VERSIONS = (1, 2)
_SINCE_2 = frozenset({"paths", "options"})


def _version_of(entry: Mapping[str, Any]) -> int:
    """Return the version of a state that can hold an entry: earlier ones knew no layers and no options."""
    return 1 if _SINCE_2.isdisjoint(entry) else 2


def _shown(entries: Iterable[Entry]) -> str:
    return ", ".join(str(entry.rule) for entry in entries) or "no rules"


def watch(observers: list[Observer], model: nn.Module) -> None:
    """Show a model to the observers that have a method for it."""
    for observer in observers:
        if hasattr(observer, "watch"):
            observer.watch(model)


def attachments_of(optimizer: Optimizer) -> list[Attachment]:
    """Return what is attached to an optimizer."""
    defaults = vars(optimizer).get("defaults")
    return list(defaults.attachments) if isinstance(defaults, CarriedDefaults) else []


class CarriedDefaults(dict[str, Any]):
    """An optimizer's default options, which are copied with the attachments of the optimizer.

    torch copies no step hooks. Of an optimizer, its state, groups and defaults are copied and pickled, and of
    these only the defaults are not in its state dict.
    """

    def __init__(self, options: Mapping[str, Any], attachments: list[Attachment]) -> None:
        super().__init__(options)
        self.attachments = attachments

    def __reduce_ex__(self, protocol: Any) -> Any:
        return CarriedDefaults, (dict(self), self.attachments)


def _carry(optimizer: Optimizer, attachment: Attachment) -> None:
    """Let copies of an optimizer be attached like the original."""
    defaults = vars(optimizer).get("defaults")
    if isinstance(defaults, CarriedDefaults):
        defaults.attachments.append(attachment)
    elif type(defaults) is dict:
        optimizer.defaults = CarriedDefaults(defaults, [attachment])


def _let_go(optimizer: Optimizer, attachment: Attachment) -> None:
    """Undo :func:`_carry`."""
    defaults = vars(optimizer).get("defaults")
    if isinstance(defaults, CarriedDefaults):
        defaults.attachments[:] = [kept for kept in defaults.attachments if kept is not attachment]
        if not defaults.attachments:
            optimizer.defaults = dict(defaults)


def _is_within(frame: FrameType | None, outer: FrameType) -> bool:
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is outer


def _is_copied_alone(attachment: Attachment) -> bool:
    """Whether ``copy.deepcopy`` was called with an attachment itself, not with something that contains it."""
    outermost: Any = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is copy.deepcopy.__code__:
            outermost = frame.f_locals.get("x")
        frame = frame.f_back
    return outermost is attachment


def _without_its_run() -> PlasticityError:
    return PlasticityError(
        "an attachment acts on its model and optimizer, and a copy of it alone on nothing: copy all three "
        "together, copy.deepcopy((bio_model, optimizer, plasticity)), or attach again"
    )
