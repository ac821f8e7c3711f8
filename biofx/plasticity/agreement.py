"""The ranks that train one model, along each dimension of their mesh, and what they agree on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from biofx.errors import PlasticityError
from biofx.operators.parts import is_sharded
from biofx.torch_private import inside_of_compiled


@dataclass(frozen=True)
class Ranks:
    """The ranks that train one model."""

    replicas: tuple[Any, ...]
    """A process group along each dimension of the mesh along which ranks have data of their own."""
    parts: tuple[Any, ...] = ()
    """The same along which they compute parts of one layer on the same data (tensor parallel)."""

    @property
    def count(self) -> int:
        """Ranks with data of their own."""
        return math.prod(distributed.get_world_size(group) for group in self.replicas)

    def add_up(self, value: Tensor) -> None:
        """Replace a tensor by its sum over the ranks with data of their own; all must call it together."""
        for group in self.replicas:
            distributed.all_reduce(value, group=group)

    def add_parts_up(self, value: Tensor) -> None:
        """Replace a tensor by its sum over the ranks that compute parts of one layer."""
        for group in self.parts:
            distributed.all_reduce(value, group=group)

    def take_largest(self, value: Tensor) -> None:
        """Replace a tensor by its largest over all ranks; all must call it together."""
        for group in (*self.replicas, *self.parts):
            distributed.all_reduce(value, distributed.ReduceOp.MAX, group=group)

    def take_smallest(self, value: Tensor) -> None:
        """Replace a tensor by its smallest over all ranks; all must call it together."""
        for group in (*self.replicas, *self.parts):
            distributed.all_reduce(value, distributed.ReduceOp.MIN, group=group)


def ranks_of(model: nn.Module) -> Ranks | None:
    """Return the ranks that train a wrapped or sharded model, None for a bare one.

    Raises:
        PlasticityError: parts of it lie on different ranks.
    """
    while not isinstance(model, DistributedDataParallel):
        inner = inside_of_compiled(model)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if isinstance(model, DistributedDataParallel):
        return Ranks((model.process_group,))
    replicas, parts, first = None, (), ""
    for path, mesh, along in _meshes(model):
        groups = tuple(mesh.get_group(axis) for axis in range(mesh.ndim))
        own, inner_groups = groups[: mesh.ndim - along], groups[mesh.ndim - along :]
        parts = parts or inner_groups
        if not own:
            continue
        if replicas is None:
            replicas, first = own, path
        elif [*map(distributed.get_process_group_ranks, own)] != [
            *map(distributed.get_process_group_ranks, replicas)
        ]:
            raise PlasticityError(
                f"expected all weights to be sharded over one mesh, found {path!r} on other ranks than "
                f"{first!r}; give fully_shard the same mesh for every part of the model"
            )
    return None if replicas is None and not parts else Ranks(replicas or (), parts)


def _meshes(model: nn.Module) -> Iterator[tuple[str, Any, int]]:
    """Yield path and mesh of each sharded parameter, and how many of the last dimensions compute parts."""
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if is_sharded(parameter):
                sharded: Any = parameter
                yield f"{path}.{name}", sharded.device_mesh, int(is_parallelized(module))


def is_parallelized(module: nn.Module) -> bool:
    """Whether ``parallelize_module`` was called for a layer itself, so that ranks compute parts of it."""
    return bool(vars(module).get("_distribute_module_applied"))


def groups_of(parameters: Iterable[Tensor]) -> tuple[Any, ...]:
    """Return the process groups along the mesh of the first parameter that is sharded."""
    found: Any = next((parameter for parameter in parameters if is_sharded(parameter)), None)
    return (
        () if found is None else tuple(found.device_mesh.get_group(n) for n in range(found.device_mesh.ndim))
    )
