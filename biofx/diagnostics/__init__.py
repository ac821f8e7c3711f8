"""What is asked of a rewritten model: checks, monitors, bisection, explanations."""

from biofx.diagnostics.audit import Audit, Finding
from biofx.diagnostics.bisection import BisectResult, bisect
from biofx.diagnostics.check import check
from biofx.diagnostics.monitor import Monitor
from biofx.diagnostics.monitor_curves import Log, curves
from biofx.diagnostics.monitor_records import LayerRecord, StepRecord
from biofx.diagnostics.unit_activity import UnitActivity

__all__ = [
    "Audit",
    "BisectResult",
    "Finding",
    "LayerRecord",
    "Log",
    "Monitor",
    "StepRecord",
    "UnitActivity",
    "bisect",
    "check",
    "curves",
]
