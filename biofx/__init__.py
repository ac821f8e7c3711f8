"""Rewrite a PyTorch model's graph so that it learns the way synapses do.

>>> import torch, biofx
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> bio_model, report = biofx.transform(model, biofx.BioConfig(weight_splitting_Gamma=2))
>>> report.modified
True
"""

from biofx import passes
from biofx.analysis.unit_groups import UnitGroup, UnitGroups, unit_groups
from biofx.analysis.units import add_unit_rule
from biofx.callables import register_activation
from biofx.capture.capture import capture
from biofx.checkpoints.checkpoint import Checkpoint, load, save
from biofx.checkpoints.model_state import plain_state
from biofx.checkpoints.optimizer_state import load_optimizer_state, optimizer_state
from biofx.checkpoints.sharded_checkpoint import load_sharded, save_sharded
from biofx.config import BioConfig
from biofx.converter import BioConverter
from biofx.deploy.deploy import deploy
from biofx.diagnostics.bisection import Culprit, bisect
from biofx.diagnostics.check import check
from biofx.diagnostics.check_report import Audit, Finding
from biofx.diagnostics.monitor import Monitor
from biofx.diagnostics.monitor_records import LayerRecord, StepRecord
from biofx.errors import (
    BiofxError,
    BisectError,
    CaptureError,
    CheckpointError,
    InputError,
    InvariantError,
    NonFiniteWeightError,
    OptionError,
    PassError,
    PipelineError,
    PlasticityError,
    SelectorError,
)
from biofx.graph.changes import diff_graphs, print_changed
from biofx.graph.printing import format_graph
from biofx.model.graph_module import BioGraphModule
from biofx.operators.rate_sampling import Distribution
from biofx.plasticity import BioModule
from biofx.plasticity.attach import attach
from biofx.plasticity.optimizer_step import Rule
from biofx.rewriting.compile_config import compile_config
from biofx.rewriting.pass_base import Pass, PassResult
from biofx.rewriting.pipeline import Pipeline
from biofx.rewriting.record import TransformRecord
from biofx.rewriting.registry import available_passes
from biofx.rewriting.remarks import Remark, applied, missed
from biofx.rewriting.report import Report
from biofx.rewriting.scope import Scope
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
    "check",
    # save, load, go on
    "save",
    "load",
    "Checkpoint",
    "save_sharded",
    "load_sharded",
    "TransformRecord",
    "deploy",
    "plain_state",
    "optimizer_state",
    "load_optimizer_state",
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
    "register_activation",
    # who is one unit
    "unit_groups",
    "add_unit_rule",
    "UnitGroups",
    "UnitGroup",
    # what comes out
    "BioGraphModule",
    "BioModule",
    "Remark",
    "Report",
    "Audit",
    "Finding",
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
    "CheckpointError",
    "PlasticityError",
    "NonFiniteWeightError",
    "InvariantError",
]
