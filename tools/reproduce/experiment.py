"""What an experiment is: arms that learn the same, what is measured of them, and what was published of it.

An experiment is one file in ``experiments/``, which ends with an :class:`Experiment`. What is common to all
is elsewhere: runs and their files, the choice of learning rates, standard errors, table, plot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import biofx
from reproduce.data import Data


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train a network."""

    config: biofx.BioConfig | None = None
    """What the network is transformed with; None for the network as it is."""
    rules: tuple[biofx.Rule, ...] = ()
    weight_decay: float = 0.0
    """Of the optimizer."""
    levelled: bool = False
    """Whether the synapses of a layer share the mean of the factors that config and rules give them."""
    freed: bool = False
    """Whether the transformed network's initial weights go back into the plain network, which then learns."""
    control: str | None = "plain"
    """The arm that it is compared with, seed by seed; None for one that is only compared with."""
    about: str = ""
    """A line on it: what it is, or what it has in common with its control."""


@dataclass(frozen=True)
class Case:
    """A setting that all arms learn in: an optimizer, a network, a share of wrong labels."""

    fixed: float | None
    """The published learning rate; None where there is none."""
    grid: tuple[float, ...] = ()
    """Learning rates to choose from."""

    @property
    def rates(self) -> tuple[float, ...]:
        """All learning rates that are run, each once."""
        first = () if self.fixed is None else (self.fixed,)
        return tuple(dict.fromkeys((*first, *self.grid)))


@dataclass(frozen=True)
class Measure:
    """A figure of a run."""

    label: str
    """What a column says of it, with its unit."""
    digits: int = 2
    lower_is_better: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run; equal jobs find equal numbers."""

    experiment: str
    dataset: str
    case: str
    arm: str
    rate: float
    seed: int
    lengths: tuple[tuple[str, int], ...]
    """How long it is, by name."""

    def length(self, name: str) -> int:
        """Return one of the lengths."""
        return dict(self.lengths)[name]

    @property
    def file_name(self) -> str:
        """Where its result is kept, in the folder of the experiment's runs."""
        lengths = [f"{name}-{number}" for name, number in self.lengths]
        parts = [self.dataset, self.case, self.arm, f"{self.rate:g}", str(self.seed), *lengths]
        return "_".join(part.replace(" ", "-").replace("/", "-") for part in parts) + ".json"


@dataclass(frozen=True)
class Measured:
    """What a run found."""

    figures: Mapping[str, float]
    """By the names of the experiment's measures; NaN for what does not exist."""
    curves: Mapping[str, list[float]] = field(default_factory=dict)
    """What was measured over time, by the names of the experiment's curves."""
    at: list[float] = field(default_factory=list)
    """Where on the axis of time the curves have their points."""


Load = Callable[[int], Data]
"""Gives the images for a seed."""
Figure = Callable[[str, str, str], float]
"""Gives the mean over the seeds, at the published learning rate, of a case, an arm and a measure."""


@dataclass(frozen=True)
class Claim:
    """What the experiment must show, at its full length."""

    text: str
    value: Callable[[Figure], float]
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Published:
    """A figure from the source."""

    what: str
    figure: str


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment: everything that the desk needs to run it, and to say what came out."""

    name: str
    about: str
    """One line."""
    source: str
    run: Callable[[Job, Load], Measured]
    """Executes a job, whose seed decides data, their order and initial weights; leaves the global random
    state as it is."""
    arms: Mapping[str, Arm]
    cases: Mapping[str, Case]
    measures: Mapping[str, Measure]
    """Columns of the table by the names of figures; differences between arms are of the first."""
    validation: str
    """The figure by which a learning rate is chosen for each arm: of data that are not reported, or of a
    whole stream of which each example is predicted before it is learned from."""
    validation_lower_is_better: bool = False
    curves: Mapping[str, str] = field(default_factory=dict)
    """Labels of the plot's axes by the names of curves."""
    time: str = ""
    """What curves run over."""
    lengths: Mapping[str, int]
    """Of a full run."""
    short: Mapping[str, int]
    """Of a run that is to be quick."""
    seeds: int
    """How many are run unless it is said otherwise."""
    needs_images: bool = True
    published: tuple[Published, ...] = ()
    claims: tuple[Claim, ...] = ()

    @property
    def first(self) -> Measure:
        """The measure that differences are of."""
        return next(iter(self.measures.values()))

    def with_controls(self, names: list[str]) -> list[str]:
        """Return arms and those that they are compared with, in the experiment's order."""
        controls = {self.arms[name].control for name in names}
        return [name for name in self.arms if name in names or name in controls]
