"""Functions that rewritten graphs call, beside those in :mod:`~biofx.operators.synapse_ops`,
a file a family of layers."""
