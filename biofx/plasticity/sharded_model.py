"""Models that FSDP2 has sharded: what a rewritten graph needs of it before it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.fx import GraphModule

from biofx.errors import PlasticityError
from biofx.plasticity.model_rules import bio_modules
from biofx.plasticity.sharded_state import shard_state, whole


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on a module itself."""
    return hasattr(type(module), "unshard")


def shard_states(model: nn.Module) -> None:
    """Let each rank keep what it needs of the state of sharded weights, in place."""
    for state in bio_modules(model).values():
        shard_state(state)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Let a sharded model have its weights and what is kept for each synapse whole; all ranks together."""
    with ExitStack() as gathered:
        for state in bio_modules(model).values():
            gathered.enter_context(whole(state))
        yield


def before_forward(model: nn.Module) -> None:
    """Prepare a model that was sharded for its forward: its states, and parts that the graph runs by itself.

    A part that was sharded by itself gathers its weights when it is called. A graph that has taken it apart
    never calls it, so its weights are gathered with the model's own, and let go with them.
    """
    shard_states(model)
    parts = list(parts_not_called(model))
    if parts:
        whole_model: Any = model
        whole_model.unshard()  # first, so that it is known as the root
        for _, part in parts:
            part.unshard()


def refuse_parts_alone(model: nn.Module) -> None:
    """Refuse a model of which parts are sharded that the graph never calls, and which is not sharded itself.

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
