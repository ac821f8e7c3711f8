"""A training monitor: what plasticity does to each layer, step by step."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from biofx.diagnostics.activity_watch import ActivityWatch
from biofx.diagnostics.effective_weight import Effective, effective_weights
from biofx.diagnostics.monitor_curves import Curves, Log, TensorBoard
from biofx.diagnostics.monitor_plot import plot_records
from biofx.diagnostics.monitor_records import (
    FactorStatistics,
    LayerRecord,
    Sink,
    StepRecord,
    Thresholds,
    drawn_below,
    measure,
)
from biofx.diagnostics.monitor_sinks import JsonLines, read_json_lines
from biofx.diagnostics.monitor_table import LiveTable
from biofx.errors import OptionError
from biofx.options import FRACTION, POSITIVE, Flag, Range
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.model_states import prepare_states, unwrapped
from biofx.plasticity.optimizer_step import LayerStep
from biofx.plasticity.ranks import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console


class Monitor:
    """Records what happens to each layer's synapses; it changes nothing and draws no random number.

    Give it to :func:`biofx.attach` as an observer, or call :meth:`record` after each step of a loop that
    applies the rules itself::

        monitor = biofx.Monitor(path="run.jsonl", every=10)
        handle = biofx.attach(bio_model, optimizer, ["crystallize"], observers=[monitor])
        with monitor.live():
            train()
        monitor.plot("run.png")

    A record has, of each layer's weight: mean, standard deviation and histogram of its learning-rate factors;
    how many of them crystallization has brought below ``crystallized_below``; synapses and units touched by
    each rule; signs that Dale's principle forbids; sums of the excitatory and of the inhibitory weights;
    norms of gradient and update; utility of synapses, utility and age of units, where rules keep them
    (:class:`biofx.diagnostics.LayerRecord` has their units).

    Of the activity of the units it has how many are dormant or dead, and the ranks
    (:class:`biofx.diagnostics.UnitActivity`). It is seen in the forwards, in training, that lead to a
    recorded step, where the graph computes it: behind the layer's nonlinearity, if one follows. All forwards
    of a step count, as where gradients accumulate. Model and state dict stay as they are. It is not seen, and
    None is recorded, of layers with several weights in one (recurrent, ``MultiheadAttention``) and in
    forwards that are compiled, traced or transformed by ``torch.func``.

    In a distributed run every rank keeps records, with the activity of its own part of the batch, and the
    first alone writes files and shows a table.

    A copy, by ``copy.deepcopy`` or pickle, keeps the records so far and follows the model that is copied
    with it, in memory alone: two runs would mix their records in one file. It sees activity from its second
    step on.

    Args:
        every: steps from one record to the next, a count >= 1; what rules touched in between is not lost.
        path: a file that gets each record as a line of JSON at once (:mod:`biofx.diagnostics.monitor_sinks`
            has its schema; :meth:`read` reads it). It may not hold anything yet, unless ``append`` is set.
        append: continue the file of an earlier monitor; the half line of a run that was killed is dropped.
        tensorboard: a folder for TensorBoard's event files, or a ``SummaryWriter``.
        log: a logger's function, called as ``log(values, step=step)`` with the numbers of each record by name
            (:func:`biofx.diagnostics.curves`): ``wandb.log``, ``mlflow.log_metrics`` and others.
        crystallized_below: see above, dimensionless, > 0. Factors that were drawn below do not count.
        keep: how many records stay in memory, a count >= 1, the latest ones; None for all. A record takes
            about 1 kB per layer.
        activity: whether the activity of units is recorded.
        dormancy: τ, a unit is dormant whose mean abs(activity) is at most this fraction of the mean of its
            layer, in [0, 1].
        rank_samples: samples of which the ranks are taken at most, a count >= 1, always the same ones. What a
            record costs grows with its square.

    Raises:
        OptionError: an option is out of range, or ``path`` cannot be used.
        InputError: ``tensorboard`` is given and the package is missing, or ``log`` cannot be called.
    """

    def __init__(
        self,
        *,
        every: int = 1,
        path: str | os.PathLike[str] | None = None,
        append: bool = False,
        tensorboard: str | os.PathLike[str] | Any = None,
        log: Log | None = None,
        crystallized_below: float = 0.9,
        keep: int | None = None,
        activity: bool = True,
        dormancy: float = 0.1,
        rank_samples: int = 256,
    ) -> None:
        self.every: int = Range(1, whole=True).check("every", every)
        self.crystallized_below: float = POSITIVE.check("crystallized_below", crystallized_below)
        self.activity: bool = Flag().check("activity", activity)
        self.dormancy: float = FRACTION.check("dormancy", dormancy)
        self.rank_samples: int = Range(1, whole=True).check("rank_samples", rank_samples)
        self.records: list[StepRecord] = []
        """What was recorded, in order."""
        self._keep = None if keep is None else Range(1, whole=True).check("keep", keep)
        self._sinks: list[Sink] = []
        if path is not None:
            self._sinks.append(JsonLines(Path(path), self._thresholds, append=append))
        if tensorboard is not None:
            self._sinks.append(TensorBoard(tensorboard))
        if log is not None:
            self.log_to(log)
        self._calls = 0
        self._touched: dict[str, dict[str, int]] = {}
        self._weights_before: dict[str, Tensor] = {}
        self._model: weakref.ref[nn.Module] | None = None
        self._states: dict[str, BioModule] = {}
        self._effective: dict[str, Effective] = {}
        self._drawn_below: dict[str, int] = {}
        self._factors: dict[str, tuple[weakref.ref[Tensor], int, FactorStatistics]] = {}
        self._activity: ActivityWatch | None = None

    def __getstate__(self) -> dict[str, Any]:
        unwatched: dict[str, Any] = {
            "_model": None,
            "_states": {},
            "_effective": {},
            "_drawn_below": {},
            "_factors": {},
            "_activity": None,
            "_weights_before": {},
            "_sinks": [],
        }
        return {**vars(self), **unwatched}

    def __repr__(self) -> str:
        steps = [record.step for record in self.records]
        told = f"{len(steps)} records" if len(steps) != 1 else "1 record"
        told += f" of steps {steps[0]} to {steps[-1]}" if steps else ""
        model = None if self._model is None else self._model()
        of = "no model yet" if model is None else f"{type(model).__name__} with {len(self._states)} weights"
        sinks = "".join(f", to {type(sink).__name__}" for sink in self._sinks)
        return f"<{type(self).__name__} of {of}: {told}, every {self.every}{sinks}>"

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Monitor:
        """Return a monitor with the records of a file, for :meth:`plot` and ``records``.

        A last line that is not whole, because the run was killed while writing it, is left out.

        Raises:
            OptionError: the file cannot be read, is of another kind or version, or is damaged elsewhere.
        """
        thresholds, records = read_json_lines(Path(path))
        monitor = cls(**asdict(thresholds))
        monitor.records = records
        return monitor

    @property
    def _thresholds(self) -> Thresholds:
        return Thresholds(self.crystallized_below, self.dormancy)

    def is_due(self, step: int) -> bool:
        """Whether the step of that number, counted from 0, is recorded."""
        return step % self.every == 0

    def watch(self, model: nn.Module) -> None:
        """Take a model for the one that is monitored; ``attach`` and :meth:`record` do it themselves.

        Raises:
            PlasticityError: it was neither transformed nor converted.
        """
        plain = unwrapped(model)
        states = prepare_states(plain)  # without weights that are computed: rules cannot act on them
        self._states = {path: state for path, state in states.items() if state.parameter is not None}
        self._effective = effective_weights(cast(GraphModule, plain), self._states)
        self._weights_before = {}
        self._drawn_below = {}
        self._factors = {}
        self._model = weakref.ref(plain)
        self._stop_seeing()
        if self.activity:
            self._activity = ActivityWatch(plain, self.rank_samples)
            self._activity.start()  # the number of the next step is not known yet

    def __call__(self, step: int, layers: Mapping[str, LayerStep]) -> None:
        """Take note of an optimizer step: the observer that :func:`biofx.attach` calls."""
        for path, layer in layers.items():
            self._add_touched(path, layer.touched)
        if self.is_due(step):
            self._add_record(
                step,
                {
                    path: self._measured(path, layer.state, layer.gradient_norm, layer.update_norm)
                    for path, layer in layers.items()
                },
            )
        self._see_before(step + 1, layers)

    def record(
        self,
        bio_model: nn.Module,
        step: int | None = None,
        *,
        replaced: Mapping[str, Any] | None = None,
    ) -> StepRecord | None:
        """Take note of a step of a loop without ``attach``: call it once after each, gradients still there.

        The gradient's norm is that of ``weight.grad`` as it is now. The update is the weight's change since
        the last call, by the optimizer or by rules; there is none at the first.

        Args:
            bio_model: a transformed or converted model, wrapped or not; always the same.
            step: number of the step, from 0; by default the calls are counted.
            replaced: what ``bio_model.rejuvenate_weights()`` returned, if it was called.

        Returns:
            The record, None if none was due.

        Raises:
            PlasticityError: the model was neither transformed nor converted.
            OptionError: ``step`` is negative, or ``replaced`` names no weight of the model.
        """
        plain = unwrapped(bio_model)
        if self._model is None or self._model() is not plain:
            self.watch(plain)
        number = self._calls if step is None else Range(0, whole=True).check("step", step)
        for path, count in (replaced or {}).items():
            if path not in self._states:
                raise OptionError(f"replaced: expected paths of weights {list(self._states)}, found {path!r}")
            if isinstance(count, int):  # else the reason why the layer was left alone
                self._add_touched(path, {"rejuvenate_weights": count})
        self._calls = number + 1
        due = self.is_due(number)
        if due:
            layers = {path: self._measured_now(path, state) for path, state in self._states.items()}
            self._add_record(number, layers)
        self._weights_before = {}
        if self.is_due(number + 1):
            self._weights_before = {p: s.weight.detach().clone() for p, s in self._states.items()}
        self._see_before(number + 1, self._states)
        return self.records[-1] if due else None

    def log_to(self, log: Log) -> None:
        """Give the numbers of each further record to a logger too, once however often it is said.

        Args:
            log: called as ``log(values, step=step)``, see :class:`Monitor`.

        Raises:
            InputError: ``log`` cannot be called.
        """
        if not any(isinstance(sink, Curves) and sink.log == log for sink in self._sinks):
            self._sinks.append(Curves(log))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the records per layer: factors, crystallized and replaced synapses, E:I ratio, and norms.

        Where it was recorded, a row each for the activity of units, and for their turnover.

        Args:
            path: also written to this file, in the format that its ending names.

        Returns:
            A ``matplotlib.figure.Figure`` that no window or global state holds on to.

        Raises:
            InputError: matplotlib is missing, or nothing has been recorded.
            OptionError: the file cannot be written.
        """
        return plot_records(self.records, self._thresholds, path)

    @contextmanager
    def live(self, console: Console | None = None) -> Iterator[None]:
        """Show the latest record as a table that follows the training: ``with monitor.live(): train()``.

        Nothing is shown where the console is not a terminal.

        Args:
            console: where to show it, by default the standard output.
        """
        from rich.console import Console

        shown = console or Console()
        if not shown.is_interactive:
            yield
            return
        table = LiveTable(self.records, shown)
        self._sinks.append(table)
        try:
            with table:
                yield
        finally:
            self._sinks.remove(table)

    def close(self) -> None:
        """Bring everything that was recorded to the disk; more may be recorded afterwards.

        Activity is seen again from the next step on.
        """
        if self._activity is not None:
            self._activity.stop()
        for sink in self._sinks:
            sink.flush()

    def _see_before(self, step: int, stepped: Iterable[str]) -> None:
        """See activity in the forwards that lead to a step that is recorded, and no others."""
        if self._activity is None:
            return
        for path in stepped:
            self._activity.forget(path)
        if self.is_due(step):
            self._activity.start()
        else:
            self._activity.stop()

    def _stop_seeing(self) -> None:
        if self._activity is not None:
            self._activity.stop()
        self._activity = None

    def _add_touched(self, path: str, touched: Mapping[str, int]) -> None:
        counts = self._touched.setdefault(path, {})
        for rule, count in touched.items():
            counts[rule] = counts.get(rule, 0) + count

    def _add_record(self, step: int, layers: dict[str, LayerRecord]) -> None:
        record = StepRecord(step, layers)
        self.records.append(record)
        if self._keep is not None:
            del self.records[: -self._keep]
        if _is_first_rank():
            for sink in self._sinks:
                sink.write(record)

    def _measured_now(self, path: str, state: BioModule) -> LayerRecord:
        weight, before = state.weight.detach(), self._weights_before.get(path)
        gradient = state.weight.grad
        return self._measured(
            path,
            state,
            None if gradient is None else gradient.norm().item(),
            None if before is None else (weight - before).norm().item(),
        )

    def _measured(
        self, path: str, state: BioModule, gradient_norm: float | None, update_norm: float | None
    ) -> LayerRecord:
        with whole(state):
            return measure(
                state,
                self._effective[path],
                factors=self._statistics(path, state),
                drawn_below=self._drawn(path, state),
                touched=self._touched.pop(path, {}),
                gradient_norm=gradient_norm,
                update_norm=update_norm,
                activity=None if self._activity is None else self._activity.take(path, self.dormancy),
            )

    def _statistics(self, path: str, state: BioModule) -> FactorStatistics:
        """Return the statistics of a weight's factors, taken anew where they have been written to."""
        acting = state.acting_factors
        known = self._factors.get(path)
        if acting is None or known is None or known[0]() is not acting or known[1] != acting._version:
            statistics = FactorStatistics.of(acting, self.crystallized_below)
            if acting is None or acting is not state.stored_factors or acting.is_inference():
                return statistics
            known = self._factors[path] = weakref.ref(acting), acting._version, statistics
        return known[2]

    def _drawn(self, path: str, state: BioModule) -> int:
        """Return how many factors are low without crystallization, counted once where they do not change."""
        if path not in self._drawn_below or state.is_dynamic or state.memory.dampening is not None:
            self._drawn_below[path] = drawn_below(state, self.crystallized_below)
        return self._drawn_below[path]


def _is_first_rank() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
