"""What passes ask of a graph; the files of rules are imported here, and enter themselves in the table."""

from biofx.analysis import rules_elementwise as rules_elementwise
from biofx.analysis import rules_layers as rules_layers
from biofx.analysis import rules_parts as rules_parts
from biofx.analysis import rules_shapes as rules_shapes
from biofx.analysis import rules_weights as rules_weights
