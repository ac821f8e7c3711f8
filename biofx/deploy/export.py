"""A model as two programs of ``torch.export``: one as it trains, one as it evaluates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from biofx.capture.trials import TrialModel, cloned
from biofx.errors import BiofxError, CaptureError, InputError
from biofx.graph.branches import take_branches
from biofx.model.copies import deep_copy
from biofx.model.graph_module import BioGraphModule, follow_changes_within
from biofx.model.modes import switch_mode
from biofx.plasticity.model_states import unwrapped
from biofx.random_state import preserved_random_state
from biofx.torch_private import pytree


def export(
    bio_model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> tuple[ExportedProgram, ExportedProgram]:
    """Export a rewritten model with ``torch.export``, once in training and once in evaluation.

    A program holds one mode, so two are needed to train with one and evaluate with the other. They hold the
    same parameters and buffers: what a step of an optimizer on ``training.module().parameters()`` changes,
    ``evaluation.module()`` computes with. Both are compared with the model for the example inputs: outputs,
    buffers afterwards, and gradients of all parameters, within the default tolerances of
    ``torch.testing.assert_close``.

    What lives in the graph goes along: splits, signs, gradient factors. Rules do not, since they act at steps
    of an optimizer on layers, of which a program has none; train such a model with :func:`biofx.attach`.

    Args:
        bio_model: a rewritten model, wrapped or not. It is not changed, and the programs share no tensor with
            it.
        args: positional arguments of one call, as ``torch.export.export`` takes them.
        kwargs: its keyword arguments.
        dynamic_shapes: which sizes are free, as ``torch.export.export`` takes them; none, if None.

    Returns:
        The programs of training and of evaluation.

    Raises:
        InputError: the model is not one that biofx made, or is sharded; ``args`` is no tuple, or ``kwargs``
            has names that the model does not take.
        CaptureError: ``torch.export`` refuses the model, or a program does not compute what the model does.

    >>> import biofx
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2))
    >>> bio_model, _ = biofx.transform(model)
    >>> x = torch.ones(3, 4)
    >>> training, evaluation = export(bio_model, (x,))
    >>> bool(torch.equal(evaluation.module()(x), bio_model.eval()(x)))
    True
    """
    model = unwrapped(bio_model)
    given = _checked(model, args, kwargs)
    follow_changes_within(model)
    own: Any = deep_copy(model)
    tensors: dict[int, Any] = {id(tensor): tensor for tensor in (*own.parameters(), *own.buffers())}
    trial = TrialModel(own)
    programs = []
    for training in (True, False):
        switch_mode(own, training)
        single = BioGraphModule.copy_of(own, dict(tensors))
        take_branches(single.graph, training=training)  # torch.export runs a graph node by node
        single.recompile()
        programs.append(_exported(single, given, dynamic_shapes))
        _compare(trial, programs[-1], given)
    training_program, evaluation_program = programs
    return training_program, evaluation_program


def _checked(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if not isinstance(model, BioGraphModule):
        raise InputError(
            f"expected a rewritten model, found a {type(model).__name__}; use biofx.transform, or "
            "torch.export.export for a model of your own"
        )
    if not isinstance(args, tuple):
        raise InputError(f"args: expected a tuple of positional arguments, found {type(args).__name__}")
    if not isinstance(kwargs, (Mapping, type(None))):
        raise InputError(f"kwargs: expected keyword arguments by name, found {type(kwargs).__name__}")
    sharded = next((name for name, p in model.named_parameters() if hasattr(p, "device_mesh")), None)
    if sharded is not None:
        raise InputError(
            f"expected whole parameters, found {sharded!r} sharded; load its checkpoint into a whole model"
        )
    order = [str(node.target) for node in model.graph.find_nodes(op="placeholder")]
    given = dict(kwargs or {})
    takes_any = any(name.startswith("**") for name in order)
    if not takes_any and (unknown := [name for name in given if name not in order]):
        raise InputError(f"kwargs: expected some of {', '.join(order)}, found {', '.join(unknown)}")
    # torch.export hands them to a graph in the order in which they are given
    return args, {**{name: given[name] for name in order if name in given}, **given}


def _exported(
    model: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]], dynamic_shapes: Any
) -> ExportedProgram:
    mode = "training" if model.training else "evaluation"
    try:
        with preserved_random_state():
            return torch.export.export(model, *cloned(given), dynamic_shapes=dynamic_shapes)
    except BiofxError:
        raise
    except Exception as error:
        raise CaptureError(
            f"torch.export refuses the model in {mode}: {type(error).__name__}: {error}; a model with parts "
            f"in Python (graph_breaks) can be trained as it is, or deployed (biofx.deploy)"
        ) from error


def _compare(
    trial: TrialModel, program: ExportedProgram, given: tuple[tuple[Any, ...], dict[str, Any]]
) -> None:
    """Raise an error unless a program computes what a model does in the mode that it has now.

    Raises:
        CaptureError: outputs, buffers or gradients differ.
    """
    mode = "training" if trial.model.training else "evaluation"
    expected = _results(trial.model, given)
    trial.restore()
    found = _results(program.module(check_guards=False), given)
    trial.restore()
    for what, values in expected.items():
        try:
            torch.testing.assert_close(found[what], values, equal_nan=True)
        except AssertionError as error:
            raise CaptureError(
                f"the program of torch.export in {mode} does not compute what the model does: {what} differ "
                f"for the example inputs. {error}"
            ) from error


def _results(model: nn.Module, given: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    """Return what a call from a fixed random state gives: outputs, buffers afterwards, gradients by name."""
    args, kwargs = cloned(given)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with preserved_random_state(), torch.enable_grad():
        torch.manual_seed(0)
        outputs = [leaf for leaf in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]
        trained = [leaf.abs().double().pow(2).sum() for leaf in outputs if leaf.requires_grad]
        gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if trained and parameters:
            total = torch.stack(trained).sum()
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {
        "outputs": [output.detach() for output in outputs],
        "buffers": {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        "gradients": {
            name: gradient
            for name, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None
        },
    }
