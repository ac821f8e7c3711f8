"""Functions that rewritten graphs call, beside those in :mod:`biofx.ops`: a file a family of layers."""
