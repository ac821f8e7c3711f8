"""The state dict of a transformed model: how it is checked, converted and loaded, and its plain part."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from biofx.errors import BiofxWarning, CheckpointError, PlasticityError, suggest
from biofx.graph.joined_graph import whole_graph
from biofx.operators.parts import is_sharded
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.model_states import expanded_weights, unwrapped
from biofx.plasticity.saved_state import EXTRA, OLDER, RATE_BUFFERS, SIGNS, Held, factors_of, form_of
from biofx.plasticity.sub_weights import plain_weights


def plain_state(bio_model: nn.Module) -> dict[str, Tensor]:
    """Return the part of a transformed model's state dict that the original has too.

    It can be loaded with ``original.load_state_dict(plain_state(bio_model))``, and a state dict of the
    original can be loaded into ``bio_model``. The weights are the parameters, before constraints, and of
    sub-weights (``weight_splitting_mode="sub-weights"``) their sum, which loading shares out again;
    :func:`biofx.deploy` returns a model with the weights that the transformed one computes.

    Raises:
        CheckpointError: ``expand-units`` has made layers wider than the original's.
    """
    model = unwrapped(bio_model)
    for path in expanded_weights(model):
        raise CheckpointError(
            f"expected a model with the original's layers, found {path!r}, whose units became excitatory and "
            "inhibitory ones (dales_method='expand'), so that the original's are smaller; save the model "
            "with biofx.save, or make a plain one with biofx.deploy"
        )
    own = tuple(owners_of(model))
    plain = {key: value for key, value in model.state_dict().items() if not key.startswith(own)}
    return {**plain, **plain_weights(model)}


def check_state(model: GraphModule, saved: Mapping[str, Any]) -> None:
    """Check that each entry of a saved state fits a model.

    The state of a layer's plasticity may hold more, or less, than the model's does so far.

    Raises:
        CheckpointError: a key is missing or unknown, a tensor has another shape or type, or the model is on
            the meta device.
    """
    owners, held = owners_of(model), model.state_dict()
    check_place(model)
    read = {str(node.target) for node in whole_graph(model).find_nodes(op="get_attr")}
    missing = [key for key in held if key not in saved and (key in read or _owner(owners, key) is None)]
    if missing:
        raise CheckpointError(
            f"model: expected {missing[0]!r} and {len(missing) - 1} more that the checkpoint does not have"
            f"{suggest(missing[0], saved)}; load into the architecture that was saved"
        )
    for key, value in saved.items():
        owner = _owner(owners, key)
        if key not in held and owner is None:
            raise CheckpointError(
                f"model: found {key!r} in the checkpoint, which this model does not have"
                f"{suggest(str(key), held)}; load into the architecture that was saved"
            )
        _check_entry(key, held.get(key), value, owner)


def check_place(model: nn.Module) -> None:
    """Check that a model has memory for values.

    Raises:
        CheckpointError: a parameter or a buffer is on the meta device.
    """
    for key, own in (*model.named_parameters(), *model.named_buffers()):
        if own.is_meta:
            raise CheckpointError(
                f"model: expected a model with memory for its values, found {key!r} on the meta device; call "
                "to_empty(device=...) first"
            )


def _check_entry(key: str, own: Any, saved: Any, owner: BioModule | None) -> None:
    if not isinstance(own, Tensor) and own is not None:
        if type(own) is not type(saved):
            raise CheckpointError(
                f"model: {key!r}: expected a {type(own).__name__}, found a {type(saved).__name__}"
            )
        return
    if not isinstance(saved, Tensor):
        raise CheckpointError(f"model: {key!r}: expected a tensor, found a {type(saved).__name__}")
    is_sign = owner is not None and key.rpartition(".")[2] in SIGNS  # which older versions kept as int8
    if own is not None and own.dtype != saved.dtype and not is_sign:
        raise CheckpointError(
            f"model: {key!r}: expected {own.dtype}, as the model has it, found {saved.dtype} in the "
            "checkpoint; convert the model with .to(dtype) as it was when saved"
        )
    if own is not None and own.shape == saved.shape:
        return
    is_extra = owner is not None and key.rpartition(".")[2] == EXTRA
    if owner is not None and is_extra and saved.shape == owner.get_extra_state().shape:
        return
    weight = None if owner is None or not owner.is_linked else owner.parameter
    if weight is not None and _may_be_state(saved, weight, per_synapse=own is not None):
        return
    found = f"expected shape {tuple(own.shape)}" if own is not None else "expected a shape like the weight's"
    raise CheckpointError(f"model: {key!r}: {found}, found {tuple(saved.shape)} in the checkpoint")


def _may_be_state(saved: Tensor, weight: Tensor, *, per_synapse: bool) -> bool:
    """Whether a tensor may be state of a layer's plasticity: per synapse, or else per unit or one number.

    State that the model has already may become state per synapse: crystallization gives each its own factor.
    """
    if saved.dim() <= 1 and not per_synapse:
        return saved.numel() <= weight.numel()
    sizes = zip(saved.shape, weight.shape, strict=False)
    return saved.dim() == weight.dim() and all(own in (1, full) for own, full in sizes)


def check_layout(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Check that a sharded model is given a sharded state.

    Raises:
        CheckpointError: the state is whole, and only a whole model can load it.
    """
    for key, own in model.state_dict().items():
        if is_sharded(own) and not is_sharded(saved.get(key)):
            raise CheckpointError(
                f"model: expected a whole model, found {key!r} sharded; load before fully_shard, or use "
                "biofx.checkpoints.save_sharded and biofx.checkpoints.load_sharded"
            )


def adopt_dtypes(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Convert the tensors of a model that was just made to the types of a saved state."""
    for key, tensor in model.state_dict(keep_vars=True).items():
        value = saved.get(key)
        if not isinstance(tensor, Tensor) or not isinstance(value, Tensor):
            continue
        if tensor.dtype != value.dtype and value.is_floating_point() == tensor.is_floating_point():
            tensor.data = tensor.data.to(value.dtype)


@torch.no_grad()
def load_state(model: GraphModule, saved: Mapping[str, Any]) -> None:
    """Load a state that :func:`check_state` has accepted."""
    for prefix, owner in owners_of(model).items():
        owner.saves_memory = prefix + EXTRA in saved
    model.load_state_dict(dict(saved), strict=True)


def owners_of(model: nn.Module) -> dict[str, BioModule]:
    """Return the state of each layer's plasticity by the prefix of its keys."""
    return {
        f"{path}." if path else "": module
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, BioModule)
    }


def convert_rates(model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state with its rates converted to the types in which a model stores them.

    A warning says by how much they were rounded.

    Raises:
        CheckpointError: the model's type cannot represent them.
    """
    made = dict(saved)
    rounded: dict[str, float] = {}
    for path, owner in model.named_modules(remove_duplicate=False):
        if not isinstance(owner, BioModule) or not owner.is_linked or owner.parameter is None:
            continue
        prefix = f"{path}." if path else ""
        given = {name: made[prefix + name] for name in owner._buffers if prefix + name in made}
        before = {name: given.get(name) for name in RATE_BUFFERS}
        if owner.is_drawn and form_of(before) is None:
            raise CheckpointError(f"model: {owner.path!r}: expected learning-rate factors, found none")
        try:
            kept = owner.with_own_form(given)
        except PlasticityError as error:
            raise CheckpointError(f"model: {owner.path!r}: {error}") from error
        after = {name: kept.get(name) for name in RATE_BUFFERS}
        if form_of(before) == form_of(after):
            continue
        for name in given:
            del made[prefix + name]
        made.update({prefix + name: value for name, value in kept.items()})
        if changed := _difference(owner, before, after):
            rounded[owner.path] = changed
    if rounded:
        warnings.warn(
            f"the learning-rate factors of {len(rounded)} weights differ from the saved ones by up to "
            f"{max(rounded.values()):.2g} ({max(rounded, key=rounded.__getitem__)}): they were saved in "
            "another type than this model stores them in; to keep the same factors, load into a model "
            "with the fuzzy_lr_dtype of the saved one",
            BiofxWarning,
            stacklevel=4,
        )
    return made


def _difference(owner: BioModule, before: Held, after: Held) -> float:
    """Return the largest difference between the factors in two forms."""
    weight = owner.weight
    found = [factors_of(held, weight.shape, weight.device) for held in (before, after)]
    first, second = (torch.ones(1) if factors is None else factors.float().cpu() for factors in found)
    return float((first - second).abs().max())


def _owner(owners: Mapping[str, BioModule], key: object) -> BioModule | None:
    """Return the plasticity state that a key may be a buffer of, None if it is no such key."""
    path, _, name = str(key).rpartition(".")
    owner = owners.get(f"{path}." if path else "")
    return owner if owner is not None and name in (*owner._buffers, *OLDER, EXTRA) else None
