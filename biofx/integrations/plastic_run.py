"""The plasticity of a run that a trainer leads: attached when training starts, saved and loaded with it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from biofx.diagnostics.monitor import Monitor
from biofx.errors import BiofxWarning, InputError, PlasticityError, suggest
from biofx.model.graph_module import BioGraphModule
from biofx.operators.parts import is_sharded
from biofx.plasticity.attach import attach
from biofx.plasticity.attachment import Attachment, attachments_of
from biofx.plasticity.model_states import unwrapped
from biofx.plasticity.optimizer_step import Observer
from biofx.plasticity.optimizers import stepping_optimizer
from biofx.plasticity.rule import Rule

_VERSION = 1


class PlasticRun:
    """The attachments of one transformed model to those of a trainer's optimizers that step it.

    Args:
        schedule: rules and when they run, as for :func:`biofx.attach`.
        monitor: records each step; of several ranks the first alone writes.
        observers: called after each step, besides the monitor.
        decay: as for :func:`biofx.attach`.
        updates: as for :func:`biofx.attach`.
        model: path of the transformed model in the module that the trainer trains; None where there is one.
    """

    def __init__(
        self,
        schedule: Iterable[Rule | str] = (),
        *,
        monitor: Monitor | None = None,
        observers: Iterable[Observer] = (),
        decay: str = "scaled",
        updates: str = "additive",
        model: str | None = None,
    ) -> None:
        if monitor is not None and not isinstance(monitor, Monitor):
            raise InputError(
                f"monitor: expected a biofx.Monitor, found {monitor!r}; other observers are observers=[...]"
            )
        self.monitor, self.path = monitor, model
        self.attachments: tuple[Attachment, ...] = ()
        self._schedule = (schedule,) if isinstance(schedule, (str, Rule)) else tuple(schedule)
        self._observers = (*(() if monitor is None else (monitor,)), *observers)
        self._decay, self._updates = decay, updates
        self._pending: Mapping[str, Any] | None = None

    def attach(self, root: nn.Module, optimizers: Iterable[Any], *, group: Any = None) -> None:
        """Attach to the optimizers that step the model, and continue where a loaded run stopped.

        An optimizer that this run is attached to already stays so; others are let go.

        Args:
            root: what the trainer trains: the transformed model, or a module that contains it.
            optimizers: the trainer's, wrapped or not.
            group: a process group, of the ranks that train replicas; None for a single process.

        Raises:
            InputError: there is no transformed model, several of which none is named, or the named one is
                not transformed.
            PlasticityError: as :func:`biofx.attach`, or the loaded state is of another run.
        """
        model = transformed_in(root, self.path)
        weights = {id(parameter) for parameter in model.parameters()}
        given = list(optimizers)
        stepped = [one for one in given if not weights.isdisjoint(map(id, _parameters(one)))]
        present = {
            id(optimizer): [
                found
                for found in attachments_of(stepping_optimizer(optimizer, model.parameters()))
                if found in self.attachments or found.is_copy
            ]
            for optimizer in stepped
        }
        kept = [found for entry in present.values() for found in entry]
        for earlier in self.attachments:
            if earlier not in kept:
                earlier.detach()
        self.attachments = ()
        made: list[Attachment] = []
        for optimizer in stepped or given[:1]:
            made += present.get(id(optimizer)) or [
                attach(
                    model,
                    optimizer,
                    self._schedule,
                    decay=self._decay,
                    updates=self._updates,
                    observers=self._observers,
                    group=group,
                )
            ]
        self.attachments = tuple(made)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._load(pending)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "attachments": (), "_pending": None}  # copies of the optimizers bring theirs

    def state_dict(self) -> dict[str, Any]:
        """Return what a later run needs to continue, in plain values and tensors; empty before training.

        Raises:
            PlasticityError: rules remember sharded tensors, of which a trainer would save one rank's part.
        """
        if not self.attachments:
            return {}
        states = [attachment.state_dict() for attachment in self.attachments]
        if any(is_sharded(tensor) for tensor in _tensors(states)):
            raise PlasticityError(
                "expected a model that each rank has whole, found sharded weights, whose rules remember a "
                "part on each rank: save with biofx.checkpoints.save_sharded"
            )
        return {"version": _VERSION, "attachments": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another run stopped: at once, or where nothing is attached yet when training starts.

        Raises:
            PlasticityError: the state is of another version, schedule or number of optimizers.
        """
        if not state:
            return
        if self.attachments:
            self._load(state)
        else:
            self._pending = state

    def resume_from(self, state: Mapping[str, Any] | None) -> None:
        """Continue where another run stopped when training starts; None for a run that begins anew."""
        self._pending = state or None

    def warn_of_none(self) -> None:
        """Warn that a checkpoint from which training goes on has no state of this callback."""
        warnings.warn(
            "the checkpoint has no state of biofx's plasticity, for it was written without this callback: "
            "the schedule counts from step 0",
            BiofxWarning,
            stacklevel=3,
        )

    def _load(self, state: Mapping[str, Any]) -> None:
        saved = state.get("attachments")
        if state.get("version") != _VERSION or not isinstance(saved, Sequence):
            raise PlasticityError(
                f"expected the plasticity of a trainer's run, version 1, found {state!r:.80}"
            )
        if len(saved) != len(self.attachments):
            raise PlasticityError(
                f"expected the state of {len(self.attachments)} optimizers, which step the model here, found "
                f"that of {len(saved)}"
            )
        for attachment, entry in zip(self.attachments, saved, strict=True):
            attachment.load_state_dict(entry)


def transformed_in(root: nn.Module, path: str | None = None) -> BioGraphModule:
    """Return the transformed model in what a trainer trains.

    Args:
        root: the transformed model, wrapped or not, or a module that contains it.
        path: of the transformed model in ``root``; None where there is one.

    Raises:
        InputError: there is none, or several of which none is named, or another module is at ``path``.
    """
    plain = unwrapped(root)
    found: dict[str, BioGraphModule] = {}
    for name, module in plain.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, BioGraphModule) and not inside:
            found[name] = module
    kind = type(plain).__name__
    if not found:
        raise InputError(
            f"expected a transformed model, or a module that contains one, found a {kind} without: give the "
            "trainer what biofx.transform returned, before its optimizer is made"
        )
    if path is not None and path not in found:
        raise InputError(
            f"model={path!r}: expected the path of a transformed model in {kind}, one of {list(found)}"
            f"{suggest(path, found)}"
        )
    if path is None and len(found) > 1:
        raise InputError(
            f"expected one transformed model in {kind}, found {list(found)}; give each a callback of its "
            f"own, as model={next(iter(found))!r}"
        )
    return found[next(iter(found)) if path is None else path]


def missing(package: str, error: ImportError) -> type[Any]:
    """Return a class in the place of one of a package that is not installed: making an object raises.

    Args:
        package: as it is called where it is installed from.
        error: of its import.
    """

    class Missing:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            raise missing_error(package, error)

    return Missing


def missing_error(package: str, error: ImportError) -> InputError:
    """Return the error that says that a package has to be installed."""
    return InputError(
        f"biofx.integrations.{package} needs the package {package}: pip install {package}, or biofx[clients] "
        f"for all that biofx is tested with ({error})"
    )


def _parameters(optimizer: Any) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
