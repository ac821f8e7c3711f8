"""What passes ask of a graph; the files of rules are imported here, and enter themselves in the table."""

from biofx.analysis import rules_elementwise as rules_elementwise
from biofx.analysis import rules_layers as rules_layers
from biofx.analysis import rules_parts as rules_parts
from biofx.analysis import rules_shapes as rules_shapes
from biofx.analysis import rules_weights as rules_weights
from biofx.analysis.layout import Axis, Size, UnitLayout
from biofx.analysis.unit_groups import UnitGroup, UnitGroups, unit_groups
from biofx.analysis.units import UnitCall, UnitValue, add_unit_rule

__all__ = [
    "Axis",
    "Size",
    "UnitCall",
    "UnitGroup",
    "UnitGroups",
    "UnitLayout",
    "UnitValue",
    "add_unit_rule",
    "unit_groups",
]
