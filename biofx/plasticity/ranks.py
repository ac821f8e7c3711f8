"""Plasticity of a model that several ranks train: replicas (DDP), and sharded weights (FSDP2).

Of a sharded weight each rank keeps the state of its own part. Factors act on the gradient of that part as it
arrives, so that a step needs no communication. A rule that needs the whole weight gathers it when it is due:
every rank then does the same with the same random numbers, and keeps its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import distributed, nn
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from biofx.errors import PlasticityError
from biofx.operators.observed_inputs import RUNNING_MEAN
from biofx.operators.rate_ops import ShardedRates
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.bio_state import PER_SYNAPSE
from biofx.plasticity.model_states import bio_modules
from biofx.plasticity.optimizers import FIRST_MOMENTS, SECOND_MOMENTS
from biofx.plasticity.shards import gathered, is_sharded, keep_part, spread_like, whole_parameters
from biofx.torch_private import inside_of_compiled

_RATES = "_sharded_rates"


# the state of one weight


def shard_state(state: BioModule) -> None:
    """Replace the state of a sharded weight by this rank's part of it; does nothing the second time."""
    weight = state.parameter
    if weight is None or not is_sharded(weight):
        return
    for name in PER_SYNAPSE:
        held = state._buffers[name]
        if held is not None and not is_sharded(held):
            state._buffers[name] = spread_like(held, weight)
    dampening = state.memory.dampening
    if dampening is not None and not is_sharded(dampening):
        state.memory.dampening = spread_like(dampening, weight)
    held = state.stored_factors
    if held is None or not is_sharded(held):
        return
    rates = vars(state).get(_RATES)
    if rates is None or rates.weight is not weight:
        rates = vars(state)[_RATES] = ShardedRates(weight)
    rates.belong_to(held)


@contextmanager
def whole(state: BioModule, optimizer: Optimizer | None = None, *, factors: bool = True) -> Iterator[None]:
    """Gather a weight, its gradient, factors and moments; at the end each rank keeps its part.

    All ranks must do it together.

    Args:
        state: of the weight.
        optimizer: whose first moments are needed, and the second ones of a masked weight.
        factors: whether the state of each synapse is needed.
    """
    weight = state.parameter
    if weight is None or not is_sharded(weight):
        yield
        return
    place = state.get_parent(), state.path.rpartition(".")[2]
    names = FIRST_MOMENTS if state.connection_mask is None else (*FIRST_MOMENTS, *SECOND_MOMENTS)
    parts = {key: held for key in PER_SYNAPSE if (held := state._buffers[key]) is not None}
    parts = {key: held for key, held in parts.items() if factors and is_sharded(held)}
    dampening = state.memory.dampening
    with whole_parameters([place], optimizer, names):
        state._buffers.update({key: gathered(held) for key, held in parts.items()})
        if factors and dampening is not None:
            state.memory.dampening = gathered(dampening)
        try:
            yield
        finally:
            for key, held in parts.items():
                changed = state._buffers[key]
                if changed is not None and changed.shape == held.shape:
                    keep_part(changed, held)
                    state._buffers[key] = held
    shard_state(state)


# the states of a model


def shard_states(model: nn.Module) -> None:
    """Replace the states of all sharded weights by this rank's part of them, in place."""
    for state in bio_modules(model).values():
        shard_state(state)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Gather all sharded weights of a model and their states; all ranks must do it together."""
    with ExitStack() as gathering:
        for state in bio_modules(model).values():
            gathering.enter_context(whole(state))
        yield


def before_forward(model: nn.Module) -> None:
    """Shard the states of a sharded model, and gather the parts that the graph does not call.

    A part that was sharded by itself gathers its weights when it is called. A graph that has taken it apart
    never calls it, so its weights are gathered, and released, with the model's own.
    """
    shard_states(model)
    parts = list(parts_not_called(model))
    if parts:
        whole_model: Any = model
        whole_model.unshard()  # first, so that it becomes the root
        for _, part in parts:
            part.unshard()


def refuse_parts_alone(model: nn.Module) -> None:
    """Refuse a model that is not sharded itself while parts are that the graph does not call.

    Raises:
        PlasticityError: there is such a part.
    """
    if is_fully_sharded(model):
        return
    for path, _ in parts_not_called(model):
        raise PlasticityError(
            f"expected the transformed model to be sharded as a whole too, fully_shard(bio_model) last, "
            f"found only parts of it sharded, as {path!r}, whose weights the graph reads without calling it"
        )


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module itself."""
    return hasattr(type(module), "unshard")


def parts_not_called(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the modules that were sharded by themselves and that the graph around them has taken apart."""
    for path, module in model.named_modules():
        if path and is_fully_sharded(module) and not _is_called(model, path):
            yield path, module


def _is_called(model: nn.Module, path: str) -> bool:
    """Whether the forward of a module is run, by a graph or by Python."""
    parts = path.split(".")
    around, inner, found = model, path, model
    for number, part in enumerate(parts[:-1]):
        found = found.get_submodule(part)
        if isinstance(found, GraphModule):
            around, inner = found, ".".join(parts[number + 1 :])
    if not isinstance(around, GraphModule) or getattr(around, "keeps_forward", False):
        return True
    called = {str(node.target) for node in around.graph.find_nodes(op="call_module")}
    names = inner.split(".")
    return any(".".join(names[: count + 1]) in called for count in range(len(names)))


# what ranks have to agree on


def group_to_agree_with(model: nn.Module, states: Iterable[BioModule]) -> Any:
    """Return the process group of a model that is wrapped in DistributedDataParallel or sharded, else None.

    Raises:
        PlasticityError: factors follow activity, or connections grow by gradient, several ranks run, and the
            model does not say which of them share it.
    """
    while not isinstance(model, DistributedDataParallel):
        inner = inside_of_compiled(model)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if isinstance(model, DistributedDataParallel):
        return model.process_group
    sharded: Any = next((parameter for parameter in model.parameters() if is_sharded(parameter)), None)
    if sharded is not None:
        return sharded.device_mesh.get_group()
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    for state in states if several else ():
        turns_over = not isinstance(state.turnover, str)
        if state.follows_activity or state.grows_by_gradient or turns_over:
            what = "factors follow activity" if state.follows_activity else "connections grow by gradient"
            what = "units are turned over by their activity" if turns_over else what
            raise PlasticityError(
                f"{what}, and each rank sees its own: expected the model wrapped in DistributedDataParallel, "
                "or sharded, found it bare; attach the wrapper, so that ranks agree"
            )
    return None


@torch.no_grad()
def average_activity(state: BioModule, group: Any) -> None:
    """Replace activity by its mean over the ranks of a group that have observed any.

    Does nothing unless factors follow activity.
    """
    if group is not None and state.follows_activity and state.activity is not None:
        seen = state.activity >= 0
        sums = torch.stack([state.activity * seen, seen.to(state.activity.dtype)])
        distributed.all_reduce(sums, group=group)
        mean = sums[0] / sums[1].clamp(min=1)
        state.activity.copy_(torch.where(sums[1] > 0, mean, state.activity))


@torch.no_grad()
def average_inputs(states: Iterable[BioModule], group: Any) -> None:
    """Replace what readers of units have seen since the last turnover by the mean over ranks.

    It is done after each step, so that buffers are the same on all ranks and those of one can be saved.
    """
    turnovers = [state.turnover for state in states if not isinstance(state.turnover, str)]
    readers = {id(reader.state): reader for turnover in turnovers for reader in turnover.readers}
    seen = [reader.seen[:RUNNING_MEAN] for reader in readers.values()]
    if group is None or not seen:
        return
    joined = torch.cat([held.flatten().to(seen[0]) for held in seen])
    distributed.all_reduce(joined, group=group)
    joined.div_(distributed.get_world_size(group))
    for held, mean in zip(seen, joined.split([held.numel() for held in seen]), strict=True):
        held.copy_(mean.view(held.shape))


@torch.no_grad()
def sum_probe(state: BioModule, group: Any) -> None:
    """Add up the gradient of missing connections over the ranks of a group, where it is awaited."""
    probe = state.connection_probe
    if group is not None and probe is not None and probe.requires_grad:
        gradient = torch.zeros_like(probe) if probe.grad is None else probe.grad
        distributed.all_reduce(gradient, group=group)
        probe.grad = gradient
