"""A plain PyTorch model that computes what a transformed one does, with no trace of biofx in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from biofx.deploy.plain_modules import make_plain, names_of_others, plain_graph_module, write_out_checks
from biofx.deploy.plain_operators import computed_on_load, replace_settings, replace_with, write_out
from biofx.deploy.raising import raise_layers
from biofx.errors import InputError, PassError
from biofx.graph.branches import take_branches
from biofx.graph.contexts import begin_autocast, begin_grad_mode
from biofx.graph.graph_functions import assign_buffer, call_with_weights, has_checkpoints
from biofx.graph.guards import require_default, require_tensor
from biofx.graph.joined_graph import whole_graph
from biofx.graph.node_kinds import changed_in_place, number_nodes
from biofx.graph.regions import graph_breaks_of, region_input, region_of_nodes
from biofx.layers.constant_part import (
    erase_unused_reads,
    evaluate_weights,
    is_of_biofx,
    register_beside,
)
from biofx.layers.weight_site import whole_weight
from biofx.model.graph_module import BioGraphModule, follow_changes_within, user_class
from biofx.model.modes import switch_mode
from biofx.model.region_parts import joined
from biofx.operators.observed_inputs import observe_inputs, observe_state
from biofx.operators.rate_ops import GRADIENT_SCALINGS, observe_activity
from biofx.operators.sign_ops import drop_pairs
from biofx.operators.split_ops import level_gradient, require_axes
from biofx.passes.fold_splits import FoldSplits
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.model_states import unwrapped
from biofx.rewriting.activation import OpaqueActivation
from biofx.rewriting.record import COMPILED, record_of

_ONLY_FOR_LEARNING = GRADIENT_SCALINGS | {
    observe_activity,
    observe_inputs,
    observe_state,
    drop_pairs,
    level_gradient,
}
_RANDOM = frozenset({"rand", "randn", "randint", "randperm", "normal", "bernoulli", "empty"})


def deploy(bio_model: nn.Module) -> nn.Module:
    """Return a plain model for inference that computes what a transformed one computes in eval mode.

    The weights are those that the graph computes, gradients are no longer scaled, and layers are ordinary
    ``torch.nn`` modules again, under their old names. The result is a ``torch.fx.GraphModule``: it can be
    saved with ``torch.save`` and loaded where biofx is not installed, scripted, exported with
    ``torch.export`` and to ONNX. It is in eval mode: the value of ``self.training`` in the model's code is
    False, and numbers that the code reads from attributes are constants. Contexts that control gradients
    (``torch.no_grad``, …) are removed: values do not depend on them.

    A module whose forward stays in Python keeps its class and its forward, and calls graph modules and
    layers; the whole model may be such a module. Its class must be importable where the result is loaded, and
    whether it can be exported depends on its forward.

    Args:
        bio_model: a transformed or converted model, wrapped (DDP, ``torch.compile``) or not; it is not
            changed.

    Raises:
        InputError: the model is no graph module, is a companion (:func:`biofx.companion`), is sharded, or
            calls modules under ``torch.utils.checkpoint``; or a module has a forward on the instance.
        CaptureError: a module was changed since the capture in a way that the graph does not follow.
        PassError: an argument that must have its default is not the last; the graph draws random numbers or
            writes to a buffer, which a plain graph module does no longer once it is loaded; or something of
            biofx in it has no plain form.

    >>> import biofx
    >>> model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> bio_model, _ = biofx.transform(model, {"apply_dales_principle": True})
    >>> deployed = deploy(bio_model)
    >>> print(biofx.format_graph(deployed))
    input_1 = input
    _0 = self.0(input_1)  # Linear
    _1 = self.1(_0)  # ReLU
    _2 = self.2(_1)  # Linear
    _3 = self.3(_2)  # ReLU
    _4 = self.4(_3)  # Linear
    return _4
    """
    model = unwrapped(bio_model)
    if not isinstance(model, GraphModule):
        raise InputError(
            f"expected a transformed or converted model, found a {type(model).__name__}; use biofx.transform"
        )
    record = record_of(model)
    if record is not None and record.steps[-1].door == COMPILED:
        raise InputError(
            "expected a transformed model, found the companion of a compiled one, which is not what runs; "
            "load its state into one: bio_model, _ = biofx.transform(model, config), "
            "bio_model.load_state_dict(companion.state_dict()), biofx.deploy(bio_model)"
        )
    if any(has_checkpoints(module.graph) for module in model.modules() if isinstance(module, GraphModule)):
        raise InputError(
            "expected a model without checkpointing, found one that calls modules under "
            "torch.utils.checkpoint; switch checkpointing off before the model is transformed"
        )
    sharded = next((name for name, p in model.named_parameters() if hasattr(p, "device_mesh")), None)
    if sharded is not None:
        raise InputError(
            f"expected whole parameters, found {sharded!r} sharded; load its checkpoint into a whole model"
        )
    own = BioGraphModule.copy_of(model)
    switch_mode(own, training=False)
    follow_changes_within(own)
    of_instances = {
        id(own.get_submodule(str(call.args[0].target)))
        for call in whole_graph(own).find_nodes(op="call_function", target=call_with_weights)
    }
    for path, module in own.named_modules():
        if (isinstance(module, BioGraphModule) and "forward" in vars(module)) or id(module) in of_instances:
            raise InputError(
                f"expected modules with the forward of their class, found {path or 'the model'!r} with a "
                "forward on the instance, which a plain model would not have; make it a method of the class"
            )
    with joined(own):
        _drop_learning(own)
    own = _folded(own)
    with joined(own):
        replace_settings(own)
        evaluate_weights(own)
        write_out(own)
        raise_layers(own)
        _move_sub_weights(own)
    for module in own.modules():
        if isinstance(module._modules.get("bio_mod"), BioModule):
            del module._modules["bio_mod"]
    regions = [module for module in own.modules() if isinstance(module, BioGraphModule) and module is not own]
    for region in (*regions, own):
        erase_unused_reads(region)
        _refuse_effects(region)
    held = dict(own.named_modules(remove_duplicate=False))
    eager = [held[path] for path in graph_breaks_of(own) if path in held]
    kinds = {(user_class(each) if isinstance(each, BioGraphModule) else type(each)) for each in eager}
    mentioned = {name for kind in kinds if kind is not None for name in names_of_others(kind)}
    for region in reversed(regions):  # the inner ones first
        make_plain(region, mentioned)
    deployed: nn.Module = own
    if own.runs_eager_forward:
        make_plain(own)
    else:
        write_out_checks(own.graph)
        deployed = plain_graph_module(own, type(model).__name__)
    _refuse_biofx(deployed)
    return switch_mode(deployed, training=False)


def _move_sub_weights(own: GraphModule) -> None:
    """Register sub-weights that no layer has taken over next to the weight that they belong to."""
    for node in own.graph.find_nodes(op="get_attr"):
        path = str(node.target)
        if whole_weight(path) != path:
            node.target = register_beside(own, own.get_parameter(path), path)


def _drop_gradient_modes(own: GraphModule) -> None:
    """Remove contexts that control gradients.

    Raises:
        PassError: the graph opens an autocast, or assigns to a buffer.
    """
    for node in own.graph.find_nodes(op="call_function", target=assign_buffer):
        raise PassError(
            f"{node.name!r} assigns to a buffer at every call, which a plain graph module forgets when it is "
            "loaded; deploy a model whose forward does not do so in eval mode"
        )
    for begin in own.graph.find_nodes(op="call_function", target=begin_grad_mode):
        for end in list(begin.users):
            own.graph.erase_node(end)
        own.graph.erase_node(begin)
    for begin in own.graph.find_nodes(op="call_function", target=begin_autocast):
        raise PassError(
            f"{begin.name!r} opens torch.autocast in the forward, which a plain graph module forgets "
            "when it is loaded; deploy a model whose forward does not, and open it around the result"
        )


def _drop_learning(own: GraphModule) -> None:
    """Remove gradient factors, observers, checks of arguments, training flags, and reads of numbers."""
    take_branches(own.graph, training=False)
    _drop_gradient_modes(own)
    for node, value in number_nodes(own, own.graph).items():
        replace_with(node, value)
    replace_settings(own)
    fixed: list[Any] = []
    regions = region_of_nodes(own.graph)
    for node in list(own.graph.nodes):
        if node.target in _ONLY_FOR_LEARNING:
            node.replace_all_uses_with(node.args[0])
        elif node.target is require_default:
            if node.args[0].target is region_input:
                continue  # Python may pass it, so the region keeps the check
            fixed.append(node.args[0])
        elif node.target is require_tensor:
            pass
        elif node.op == "call_module" and isinstance(
            function := own.get_submodule(str(node.target)), OpaqueActivation
        ):
            node.op, node.target = "call_function", function.function
            continue
        elif node.op == "call_module" and "bio_mod" in str(node.target).split("."):
            region = regions.get(node, "")
            inner = str(node.target)[len(region) + bool(region) :].split(".")
            name = "_".join(part for part in inner if part != "bio_mod")
            own.get_submodule(region).add_module(name, own.get_submodule(str(node.target)))
            node.target = f"{region}.{name}" if region else name
            continue
        else:
            continue
        own.graph.erase_node(node)
    _drop_fixed_arguments(own, fixed)


def _drop_fixed_arguments(own: GraphModule, fixed: list[Node]) -> None:
    """Remove arguments that must have their default from the signature, since nothing checks them any more.

    Raises:
        PassError: another argument follows, which would move to its place.
    """
    arguments = list(own.graph.find_nodes(op="placeholder"))
    while arguments and arguments[-1] in fixed and not arguments[-1].users:
        own.graph.erase_node(arguments.pop())
    left = next((node for node in fixed if node in arguments), None)
    if left is not None:
        raise PassError(
            f"argument {left.target!r} must have its default, which a plain model does not check, and stands "
            "before other arguments; deploy a model whose forward has it last, or not at all"
        )


def _folded(own: BioGraphModule) -> BioGraphModule:
    """Return the model with sums over synapses folded into weights, if it then takes the same inputs."""
    folded = FoldSplits().on_own(BioGraphModule.copy_of(own)).graph_module

    def checks(graph_module: GraphModule) -> int:
        return len(whole_graph(graph_module).find_nodes(op="call_function", target=require_axes))

    return folded if checks(folded) == checks(own) else own


def _refuse_effects(own: GraphModule) -> None:
    """Refuse what happens at every call, and would happen only once when torch loads the graph module.

    Raises:
        PassError: a node draws random numbers, or changes a tensor of the model.
    """
    for node in computed_on_load(own):
        name = str(getattr(node.target, "__name__", node.target))
        writes = any(changed.op == "get_attr" for changed in changed_in_place(node))
        if node.op != "get_attr" and (writes or name.rstrip("_") in _RANDOM):
            what = "writes to a tensor of the model" if writes else "draws random numbers"
            raise PassError(
                f"{node.name!r} ({name}) {what} at every call, which a plain graph module forgets when "
                "it is loaded; deploy a model whose forward does not do so in eval mode"
            )


def _refuse_biofx(deployed: nn.Module) -> None:
    """Refuse to return a model that needs biofx.

    Raises:
        PassError: a node calls a function of biofx, or a module is of a class of biofx.
    """
    found: Iterator[str] = (
        node.name
        for module in deployed.modules()
        if isinstance(module, GraphModule)
        for node in module.graph.nodes
        if (node.op == "call_function" and is_of_biofx(node.target))
    )
    modules = (
        path
        for path, module in deployed.named_modules()
        if any(
            is_of_biofx(kind) for thing in (module, *vars(module).values()) for kind in type(thing).__mro__
        )
    )
    for name in (*found, *modules):
        raise PassError(f"{name!r} belongs to biofx and has no plain form; leave out the pass that made it")
