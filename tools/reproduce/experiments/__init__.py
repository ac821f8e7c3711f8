"""The experiments by name; each is one file here."""

from reproduce.experiment import Experiment
from reproduce.experiments import ablations

EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in (ablations.EXPERIMENT,)}
