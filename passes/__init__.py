"""The rewrites of biofx, one per file; import them as ``biofx.passes``."""

if __name__ != "biofx.passes":
    raise ImportError(
        f"this folder is the package 'biofx.passes'; it was imported as {__name__!r}. "
        "Write 'from biofx import passes' instead."
    )

from biofx.passes.constrain_signs import ConstrainSigns
from biofx.passes.expand_units import ExpandUnits
from biofx.passes.fold_splits import FoldSplits
from biofx.passes.mask_weights import MaskWeights
from biofx.passes.observe_activity import ObserveActivity
from biofx.passes.scale_gradients import ScaleGradients
from biofx.passes.split_weights import SplitWeights
from biofx.passes.watch_units import WatchUnits
from biofx.rewriting.registry import register_built_in

__all__ = [
    "SplitWeights",
    "ExpandUnits",
    "MaskWeights",
    "ConstrainSigns",
    "ScaleGradients",
    "ObserveActivity",
    "FoldSplits",
    "WatchUnits",
]

register_built_in(
    *(SplitWeights, ExpandUnits, MaskWeights, ConstrainSigns, ScaleGradients, ObserveActivity, FoldSplits),
    WatchUnits,
)
