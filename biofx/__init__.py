"""Rewrite a PyTorch model's graph so that it learns the way synapses do.

>>> import torch, biofx
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> bio_model, report = biofx.transform(model, biofx.BioConfig(weight_splitting_Gamma=2))
>>> report.modified
True
"""

from biofx import passes
from biofx.bisection import Culprit, bisect
from biofx.capture import capture
from biofx.compile_config import compile_config
from biofx.config import BioConfig, Distribution
from biofx.converter import BioConverter
from biofx.errors import (
    BiofxError,
    BisectError,
    CaptureError,
    InputError,
    NonFiniteWeightError,
    OptionError,
    PassError,
    PipelineError,
    PlasticityError,
    SelectorError,
)
from biofx.graph_module import BioGraphModule
from biofx.monitor import Monitor
from biofx.monitor_records import LayerRecord, StepRecord
from biofx.pass_base import Pass, PassResult, Scope
from biofx.pipeline import Pipeline
from biofx.plasticity import BioModule
from biofx.plasticity.attach import attach
from biofx.plasticity.schedule import Rule
from biofx.printing import diff_graphs, format_graph, print_changed
from biofx.registry import available_passes
from biofx.report import Remark, Report, applied, missed
from biofx.transform import transform

__version__ = "0.1.0"

__all__ = [
    # the front door
    "transform",
    "capture",
    "BioConverter",
    "BioConfig",
    "Distribution",
    "attach",
    "Rule",
    "Monitor",
    "StepRecord",
    "LayerRecord",
    # passes
    "Pass",
    "PassResult",
    "Pipeline",
    "Scope",
    "applied",
    "missed",
    "passes",
    "available_passes",
    "compile_config",
    # what comes out
    "BioGraphModule",
    "BioModule",
    "Remark",
    "Report",
    "format_graph",
    "diff_graphs",
    "print_changed",
    "bisect",
    "Culprit",
    # what can go wrong
    "BiofxError",
    "InputError",
    "CaptureError",
    "OptionError",
    "SelectorError",
    "PipelineError",
    "PassError",
    "BisectError",
    "PlasticityError",
    "NonFiniteWeightError",
]
