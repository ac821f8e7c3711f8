"""What a pass is: pipelines, selection of candidates, remarks and reports."""

from biofx.rewriting.compile_config import compile_config
from biofx.rewriting.model_coverage import LeftAlone, MechanismCoverage, ModelCoverage, PassCoverage
from biofx.rewriting.pass_base import Pass, PassResult, Place
from biofx.rewriting.pipeline import Pipeline
from biofx.rewriting.record import TransformRecord, TransformStep
from biofx.rewriting.registry import available_passes
from biofx.rewriting.remarks import PassReport, Remark, Unmet, applied, missed
from biofx.rewriting.report import Report
from biofx.rewriting.scope import Scope

__all__ = [
    "LeftAlone",
    "MechanismCoverage",
    "ModelCoverage",
    "Pass",
    "PassCoverage",
    "PassReport",
    "PassResult",
    "Pipeline",
    "Place",
    "Remark",
    "Report",
    "Scope",
    "TransformRecord",
    "TransformStep",
    "Unmet",
    "applied",
    "available_passes",
    "compile_config",
    "missed",
]
