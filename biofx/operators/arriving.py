"""What is done to the gradient of a weight once the ranks of a run have shared theirs.

Factors commute with the mean over ranks, and a projection onto signs does not: a rank on its own would keep
parts of its gradient that the mean leads elsewhere. So where ranks train together, the backward of such an
operation lets the gradient pass and says what is to be done with it (:meth:`Arrival.expect`), and that is
done to this rank's part of the mean, when it has arrived.

Of a sharded model (FSDP2, HSDP) a weight arrives by a hook of torch on its parameter. Replicas
(DistributedDataParallel) get all of theirs at the end of the backward. Gradients that were there before are
put aside meanwhile, since each is to be changed once; those of backwards without synchronisation are changed
together, as those of one batch.

A weight that is no parameter, but computed from others, has nowhere to arrive (:func:`refuse_computed`).
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from biofx.errors import PlasticityError
from biofx.operators.parts import local
from biofx.torch_private import call_after_backward, replicas_in_forward, running_backward

_ATTRIBUTE = "_biofx_arrival"
_PARAMETER = "_biofx_parameter"
_IN_PARTS = "_biofx_computed_in_parts"
Action: TypeAlias = Callable[[Tensor], None]
"""Changes this rank's part of a gradient, in place."""


class Arrival(ABC):
    """Acts on what arrives in the gradient of one parameter; made once for each.

    Args:
        weight: of a sharded model or of replicas.
    """

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self._actions: dict[str, Action] = {}
        self._earlier: Tensor | None = None
        self._task = -1
        vars(weight)[_ATTRIBUTE] = self

    def __reduce__(self) -> Any:
        return type(None), ()  # copies of a parameter have none

    @abstractmethod
    def expect(self, name: str, action: Action) -> None:
        """Prepare for the gradient of the backward that is running.

        Args:
            name: of what is to be done; the same is done once however often the weight is used.
            action: what is to be done.
        """

    def _act(self, gradient: Tensor) -> Tensor:
        """Change a gradient, add what was there before, and return the sum."""
        part, earlier = local(gradient), self._earlier
        for action in self._actions.values():
            action(part)
        self._actions, self._earlier = {}, None
        if earlier is None:
            return gradient
        local(earlier).add_(part)
        return earlier


class ShardedArrival(Arrival):
    """Of a weight of a sharded model.

    Args:
        weight: sharded.
        owner: the module that holds it, and in a forward all of it.
        name: of the parameter there.
    """

    def __init__(self, weight: nn.Parameter, owner: nn.Module, name: str) -> None:
        super().__init__(weight)
        self.owner, self.name = owner, name
        self._missed = False
        weight.register_post_accumulate_grad_hook(self._arrived)
        _SHARDED.add(self)

    def belong_to(self, held: Tensor) -> None:
        """Mark a tensor as this weight's, by an attribute that copies do not have."""
        vars(held)[_ATTRIBUTE] = self

    def expect(self, name: str, action: Action) -> None:  # noqa: D102
        task = running_backward()
        if self._actions and task == self._task:
            self._actions[name] = action
            return  # another use of the weight has prepared
        # what was put aside by a backward that failed is gone, as gradients of a failed backward are
        self._actions, self._earlier, self._missed, self._task = {name: action}, None, False, task
        if self.weight.grad is not None:
            self._earlier, self.weight.grad = self.weight.grad, None
            call_after_backward(self._put_back)

    def _arrived(self, weight: Tensor) -> None:
        """Act on the gradient that has arrived, and add it to what there was."""
        if self._missed:
            raise PlasticityError(
                "the gradient of a sharded weight arrived after the backward that made it, on top of an "
                "earlier one, so its factors cannot be applied to it alone; call zero_grad() before each "
                "backward, or checkpoint with use_reentrant=False"
            )
        if not self._actions:
            return
        gradient = weight.grad
        if gradient is None:
            weight.grad, self._earlier, self._actions = self._earlier, None, {}
        else:
            weight.grad = self._act(gradient)

    def _put_back(self) -> None:
        """At the end of a backward in which no gradient arrived (gradients are not shared yet): undo."""
        if self._earlier is not None:
            self.weight.grad, self._earlier = self._earlier, None
            self._actions, self._missed = {}, True


class ReplicatedArrival(Arrival):
    """Of a weight of replicas, which share gradients at the end of a backward."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight)
        self.shares = True
        """Whether the gradients of the last forward are shared in its backward."""
        self.may_be_unused = False
        """Whether on some ranks a backward may not reach the weight."""
        self._waits = False

    def expect(self, name: str, action: Action) -> None:  # noqa: D102
        task = running_backward()
        if self._actions and task == self._task:
            return
        self._actions, self._earlier, self._task = {name: action}, None, task
        if not self.shares:
            self._actions, self._waits = {}, True
            return
        gradient = self.weight.grad
        if gradient is not None and not self._waits and not self.may_be_unused:
            # its memory may be that of a bucket, which is filled anew
            self._earlier, self.weight.grad = gradient.clone(), None
        call_after_backward(
            lambda: call_after_backward(self._arrived)
        )  # behind the one in which the ranks share their gradients

    def _arrived(self) -> None:
        gradient, self._waits = self.weight.grad, False
        if gradient is None:
            self.weight.grad, self._earlier, self._actions = self._earlier, None, {}
            return
        earlier = self._earlier
        self._earlier = None
        self._act(gradient)
        if earlier is not None:
            gradient.add_(earlier)


_SHARDED: weakref.WeakSet[ShardedArrival] = weakref.WeakSet()
_FORWARDS: list[tuple[Any, ...]] = []
"""The process groups over which the forwards that are running now will average their gradients."""


def begin_sharing(groups: Sequence[Any]) -> None:
    """Say that gradients of the forward of a sharded model that begins will be averaged over some groups."""
    _FORWARDS.append(tuple(groups))


def end_sharing() -> None:
    """Say that the forward is over."""
    _FORWARDS.pop()


def is_shared() -> bool:
    """Whether gradients of the forward that is running, or computed again, may be shared by ranks."""
    shared = bool(_FORWARDS) or replicas_in_forward() is not None
    return shared or (not torch.compiler.is_compiling() and bool(_SEEN))


_SEEN: list[None] = []
"""Not empty where there were replicas."""


def remember_parameter(made: Tensor, weight: Tensor) -> Tensor:
    """Note of which parameter a tensor is the values that are used, and return it."""
    if (parameter := parameter_of(weight)) is not None:
        vars(made)[_PARAMETER] = parameter
    return made


def parameter_of(weight: Tensor) -> Tensor | None:
    """Return the parameter whose values are used, None where they are computed in some other way."""
    found: Tensor | None = vars(weight).get(_PARAMETER)
    return weight if found is None and weight.is_leaf else found


def arrival_of(weight: Tensor) -> Arrival | None:
    """Return where the gradient of a weight arrives; None if it is this rank's alone, or has no place.

    Args:
        weight: in a forward: a parameter, or what was made of one.
    """
    parameter = parameter_of(weight)
    if parameter is None:
        return None
    known: Arrival | None = vars(parameter).get(_ATTRIBUTE)
    replicas: Any = replicas_in_forward()
    if isinstance(known, ShardedArrival):
        return known
    if replicas is not None:
        if not isinstance(known, ReplicatedArrival):
            known = ReplicatedArrival(parameter)  # type: ignore[arg-type]
            _SEEN[:] = [None]
        known.shares = bool(replicas.require_backward_grad_sync)
        known.may_be_unused = bool(replicas.find_unused_parameters)
        return known
    if _FORWARDS:
        for arrival in _SHARDED:
            if arrival.owner._parameters.get(arrival.name) is parameter:
                vars(parameter)[_ATTRIBUTE] = arrival
                return arrival
    is_again = running_backward() != -1  # what checkpointing did not keep
    return known if is_again else None


def compute_in_parts(weight: nn.Parameter) -> None:
    """Note of a sharded parameter that its layer is computed in parts (tensor parallel)."""
    vars(weight)[_IN_PARTS] = True


def is_computed_in_parts(weight: Tensor) -> bool:
    """Whether the layer of a sharded weight, or of what was made of one, is computed in parts."""
    parameter = parameter_of(weight)
    if parameter is None:
        return False
    if not vars(parameter).get(_IN_PARTS):
        arrival = arrival_of(
            parameter
        )  # in a forward of a model that is sharded further, it is another tensor
        if not isinstance(arrival, ShardedArrival) or arrival.weight is parameter:
            return False
        vars(parameter)[_IN_PARTS] = bool(vars(arrival.weight).get(_IN_PARTS))
    return bool(vars(parameter)[_IN_PARTS])


def arrival_at(held: Tensor) -> ShardedArrival:
    """Return the arrival that a spread tensor was marked for.

    Raises:
        PlasticityError: there is none.
    """
    found = vars(held).get(_ATTRIBUTE)
    if not isinstance(found, ShardedArrival):
        raise PlasticityError(
            "expected factors, or a mask, that belong to a sharded weight, found others that are spread over "
            "ranks; call "
            "bio_model.reshard(), so that each weight has its own, and call the model itself, not its forward"
        )
    return found


def groups_to_average() -> tuple[Any, ...]:
    """Return the process groups over which gradients of the forward that is running will be averaged."""
    if _FORWARDS:
        return _FORWARDS[-1]
    replicas: Any = replicas_in_forward()
    return () if replicas is None else (replicas.process_group,)


class _Announced(torch.autograd.Function):
    """A view forwards; backwards, word that a gradient is on its way."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, arrival: Arrival, name: str, action: Action) -> Tensor:
        ctx.source = arrival, name, action
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        arrival, name, action = ctx.source
        arrival.expect(name, action)
        return gradient, None, None, None


def refuse_computed(groups: Sequence[Any]) -> None:
    """Refuse a weight that is no parameter, where several ranks will average gradients.

    Raises:
        PlasticityError: there are several ranks.
    """
    if any(torch.distributed.get_world_size(group) > 1 for group in groups):
        raise PlasticityError(
            "dales_method='project' acts on the mean of the gradients of all ranks: expected a weight that "
            "is a parameter, found one that is computed from others; take dales_method='abs'"
        )


def sharded_arrival(weight: nn.Parameter, owner: nn.Module, name: str) -> ShardedArrival:
    """Return where the gradient of a sharded weight arrives; made once for each.

    Where ranks compute parts of a layer whose parts are sharded further, a forward has another tensor in the
    place of the weight, which is sharded along fewer dimensions; its gradient arrives at the weight.

    Args:
        weight: sharded.
        owner: the module that holds it.
        name: of the parameter there.
    """
    known = vars(weight).get(_ATTRIBUTE)
    if isinstance(known, ShardedArrival):
        return known
    for arrival in _SHARDED:
        if (
            arrival.owner is owner
            and arrival.name == name
            and _dimensions(arrival.weight) > _dimensions(weight)
        ):
            vars(weight)[_ATTRIBUTE] = arrival
            return arrival
    return ShardedArrival(weight, owner, name)


def _dimensions(weight: Tensor) -> int:
    """Return the dimensions of the mesh over which a tensor is sharded, a count."""
    sharded: Any = weight
    return int(sharded.device_mesh.ndim)


def announced(weight: Tensor, arrival: Arrival, name: str, action: Action) -> Tensor:
    """Return a weight unchanged; in its backward, something is to be done with its gradient.

    Args:
        weight: a view of it is returned.
        arrival: where its gradient arrives.
        name: of what is to be done.
        action: what is to be done.
    """
    marked: Tensor = _Announced.apply(weight, arrival, name, action)  # type: ignore[no-untyped-call]
    return marked
