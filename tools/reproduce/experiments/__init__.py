"""The experiments by name; each is one file here."""

from reproduce.experiment import Experiment
from reproduce.experiments import (
    ablations,
    online_permuted_images,
    permuted_tasks_consolidation,
    slowly_changing_regression,
)

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        slowly_changing_regression.EXPERIMENT,
        online_permuted_images.EXPERIMENT,
        permuted_tasks_consolidation.EXPERIMENT,
        ablations.EXPERIMENT,
    )
}
