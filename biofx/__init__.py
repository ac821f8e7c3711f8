"""Rewrite a PyTorch model's graph so that it learns the way synapses do.

>>> import torch, biofx
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
>>> bio_model, report = biofx.transform(model, biofx.BioConfig(weight_splitting_Gamma=2))
>>> report.modified
True

What most programs need is here. The rest is in packages:

- :mod:`biofx.passes`: the rewrites;
- :mod:`biofx.rewriting`: what pipelines, remarks and reports consist of;
- :mod:`biofx.checkpoints`: files of several ranks, and the states of model and optimizer as plain values;
- :mod:`biofx.compiling`: what a backend of ``torch.compile`` says of itself;
- :mod:`biofx.diagnostics`: what checks, monitors and bisection return;
- :mod:`biofx.select`: how nodes are selected;
- :mod:`biofx.analysis`, :mod:`biofx.plasticity`, :mod:`biofx.graph`: what those who write passes use;
- :mod:`biofx.errors`: every exception.
"""

import warnings

from biofx._startup import import_everything, is_reading_arguments
from biofx._version import __version__ as __version__
from biofx.errors import suggest

if not is_reading_arguments():
    from biofx import (
        analysis,
        checkpoints,
        compiling,
        diagnostics,
        errors,
        graph,
        passes,
        plasticity,
        rewriting,
        select,
    )
    from biofx.analysis import add_unit_rule, unit_groups
    from biofx.callables import register_activation
    from biofx.capture.capture import capture
    from biofx.checkpoints import load, save
    from biofx.compiling import backend, companion, inductor_pass
    from biofx.config import BioConfig
    from biofx.converter import BioConverter
    from biofx.deploy.deploy import deploy
    from biofx.deploy.export import export
    from biofx.diagnostics import Monitor, bisect, check
    from biofx.errors import BiofxError, BiofxWarning, CaptureError, OptionError
    from biofx.graph import format_graph
    from biofx.model.graph_module import BioGraphModule
    from biofx.operators.rate_sampling import Distribution
    from biofx.plasticity import BioModule
    from biofx.plasticity.attach import attach
    from biofx.plasticity.rule import Rule
    from biofx.rewriting import Pass, PassResult, Pipeline, Remark, Report, Scope, applied, missed
    from biofx.transform import transform

    _PUBLIC = (analysis, checkpoints, compiling, diagnostics, errors, graph, plasticity, rewriting, select)

__all__ = [
    # make a model
    "transform",
    "BioConverter",
    "BioConfig",
    "Distribution",
    "capture",
    # train it
    "attach",
    "Rule",
    "Monitor",
    "check",
    # compile it
    "backend",
    "companion",
    "inductor_pass",
    # keep it
    "save",
    "load",
    "deploy",
    "export",
    # what it consists of
    "BioGraphModule",
    "BioModule",
    "format_graph",
    "Report",
    "Remark",
    "bisect",
    # extend it
    "passes",
    "Pass",
    "PassResult",
    "Pipeline",
    "Scope",
    "applied",
    "missed",
    "unit_groups",
    "add_unit_rule",
    "register_activation",
    # errors that programs catch, and what they filter; the others are in biofx.errors
    "BiofxError",
    "BiofxWarning",
    "CaptureError",
    "OptionError",
]

_PLACES = (
    *("analysis", "checkpoints", "compiling", "diagnostics", "errors", "graph"),
    *("plasticity", "rewriting", "select"),
)
_RENAMED = {"Culprit": "BisectResult"}


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", *_PLACES])


def __getattr__(name: str) -> object:
    """Return a name of version 0.1 from where it lies now, with a warning that says so."""
    if is_reading_arguments() and name in (*__all__, *_PLACES):
        import_everything()
        return globals()[name]
    now = _RENAMED.get(name, name)
    for module in () if is_reading_arguments() else _PUBLIC:
        if now in module.__all__:
            message = f"biofx.{name} moved to {module.__name__}.{now}"
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return getattr(module, now)
    raise AttributeError(f"module 'biofx' has no attribute {name!r}{suggest(name, __dir__())}")
