"""The experiments by name; each is one file here."""

from reproduce.experiment import Experiment
from reproduce.experiments import (
    ablations,
    dale_perceptrons,
    gradient_inversion,
    label_noise,
    online_permuted_images,
    permuted_tasks_consolidation,
    slowly_changing_regression,
    synaptic_diversity,
)

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        slowly_changing_regression.EXPERIMENT,
        online_permuted_images.EXPERIMENT,
        permuted_tasks_consolidation.EXPERIMENT,
        synaptic_diversity.EXPERIMENT,
        gradient_inversion.EXPERIMENT,
        label_noise.EXPERIMENT,
        dale_perceptrons.EXPERIMENT,
        ablations.EXPERIMENT,
    )
}
