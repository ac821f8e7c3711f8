"""What passes ask of a graph.

``forward.py`` walks the graph and has the table of rules, one entry an operation; units and replication are
two analyses on it. The files of rules are imported here and enter themselves in the table:

* ``rules_elementwise``: entry by entry, on one value or several;
* ``rules_shapes``: what moves entries, reduces an axis or mixes entries along one (reshape, mean, …);
* ``rules_parts``: what takes values apart or puts them together (an index, ``chunk``, ``cat``, ``stack``);
* ``rules_norms_pooling``: normalisation, pooling, padding, resampling;
* ``rules_weights``: layers with weights, and attention.
"""

from biofx.analysis import rules_elementwise as rules_elementwise
from biofx.analysis import rules_norms_pooling as rules_norms_pooling
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
