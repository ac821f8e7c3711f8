"""The end of one task and the beginning of the next: what becomes important then.

Elastic consolidation and memory-aware synapses look at the gradient of each sample by itself. Samples go
through the model one by one, in evaluation, by ``torch.autograd.grad``: gradients that are there, random
states, running statistics and modes stay as they are.

Where replicas train (DDP), each rank gives samples of its own, and all count; a sharded model needs every
rank for each sample, so all ranks give the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, distributed, nn

from biofx.errors import PlasticityError
from biofx.operators.parts import is_sharded, local
from biofx.operators.sampling import generator_for
from biofx.plasticity.agreement import Ranks
from biofx.plasticity.bio_module import BioModule
from biofx.plasticity.consolidated_state import OF_TASKS, RULES
from biofx.random_state import preserved_random_state

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From the output for one sample and its target, both with a batch axis of 1, to -log p, of shape ``()``."""
_FROM_DATA = ("elastic", "memory-aware")


def begin_task(
    model: nn.Module,
    states: Iterable[BioModule],
    rules: Iterable[str],
    batches: Iterable[Any] | None,
    loss: Loss | None,
    ranks: Ranks | None,
) -> None:
    """End the task that is running, and begin another; see :meth:`biofx.plasticity.Attachment.begin_task`.

    Args:
        model: transformed, not wrapped.
        states: of the weights that the optimizer steps.
        rules: names of those that are scheduled.
        batches: see there.
        loss: see there.
        ranks: those that agree, None for this one alone.
    """
    methods = {RULES[name] for name in rules if name in OF_TASKS}
    held = [
        state for state in states if state.config.consolidation in methods and state.anchor_weight is not None
    ]
    if not held:
        raise PlasticityError(
            f"begin_task: expected a scheduled rule that consolidates at the end of a task "
            f"({', '.join(sorted(OF_TASKS))}), found none"
        )
    asking = {state.config.consolidation for state in held}
    if isinstance(batches, Tensor) or _is_pair(batches):
        raise PlasticityError(
            "begin_task: expected an iterable of batches, found one batch; put it into a list, [batch]"
        )
    if batches is None and loss is not None:
        raise PlasticityError("begin_task: expected batches with the loss, found none")
    if batches is not None and asking.isdisjoint(_FROM_DATA):
        raise PlasticityError("begin_task: synaptic_intelligence needs no data; leave the batches out")
    if loss is not None and "elastic" not in asking:
        raise PlasticityError("begin_task: memory_aware looks at outputs alone; leave the loss out")
    if batches is None and any(
        state.config.consolidation == "memory-aware" and state.steps_of_task for state in held
    ):
        raise PlasticityError(
            "begin_task: memory_aware finds importance on data: expected batches of the task that ends, "
            "begin_task(batches=...), found none"
        )
    found = {} if batches is None else _found_on(model, held, batches, loss, ranks)
    results = [state.importance_after(found.get(state.path)) for state in held]
    for state, importance in zip(held, results, strict=True):
        state.begin_task(importance)


def _found_on(
    model: nn.Module, held: list[BioModule], batches: Iterable[Any], loss: Loss | None, ranks: Ranks | None
) -> Mapping[str, Tensor]:
    """Return the importance that data show, of this rank's part of each weight, by path."""
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if several and ranks is None:
        raise PlasticityError(
            "begin_task: each rank has batches of its own: expected the model wrapped in "
            "DistributedDataParallel when it was attached, or sharded, found it bare"
        )
    trained = [state for state in held if state.weight.requires_grad]
    sums = {
        state.path: torch.zeros_like(local(state.importance))
        for state in trained
        if state.importance is not None and state.config.consolidation in _FROM_DATA
    }
    of_method = {
        method: [state for state in trained if state.config.consolidation == method] for method in _FROM_DATA
    }
    sharded = any(is_sharded(state.weight) for state in held)
    earlier = held[0].task_counts
    number = 0 if earlier is None else int(earlier[0])
    generator = generator_for(held[0].config.seed, "", number, purpose="labels")
    count = 0
    if torch.is_inference_mode_enabled():
        raise PlasticityError(
            "begin_task: data show importance by gradients, and torch.inference_mode takes none; call it "
            "outside of that"
        )
    with preserved_random_state(), _in_evaluation(model), torch.enable_grad():
        for inputs, target in _samples(batches, ranks if sharded else None):
            count += 1
            for method, states in of_method.items():
                if not states:
                    continue
                output = _output_of(model, inputs)
                if method == "memory-aware":
                    value = output.square().sum()
                else:
                    value = _surprise(output, target, loss, generator)
                for state, gradient in zip(states, _gradients(value, states, sharded), strict=True):
                    total = sums[state.path]
                    if gradient is not None:
                        slope = state.loss_gradient(gradient).to(total.dtype)
                        total.add_(slope.abs()) if method == "memory-aware" else total.addcmul_(slope, slope)
    counted = torch.tensor(count, dtype=torch.float64, device=local(held[0].weight).device)
    if ranks is not None and not sharded:
        for each in (counted, *sums.values()):
            ranks.add_up(each)
    if not counted:
        raise PlasticityError("begin_task: expected batches with samples, found none")
    return {path: total / float(counted) for path, total in sums.items()}


def _is_pair(batches: object) -> bool:
    """Whether it is a pair of tensors, as one batch is; two batches come in a list."""
    return isinstance(batches, tuple) and len(batches) == 2 and all(isinstance(b, Tensor) for b in batches)


def _samples(batches: Iterable[Any], ranks: Ranks | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the input of each sample, and its target if there is one, with a batch axis of 1."""
    for batch in batches:
        inputs, target = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
        if not isinstance(inputs, Tensor) or not isinstance(target, (Tensor, type(None))) or not inputs.dim():
            raise PlasticityError(
                "begin_task: expected batches that are tensors, or pairs of inputs and targets, with the "
                f"samples along their first axis, found a {type(batch).__name__}"
            )
        if target is not None and (not target.dim() or len(target) != len(inputs)):
            raise PlasticityError(
                f"begin_task: expected a target for each of {len(inputs)} samples, found "
                f"{tuple(target.shape)}"
            )
        if ranks is not None:
            _check_same(inputs, ranks)
        for number in range(len(inputs)):
            one = slice(number, number + 1)
            yield inputs[one], None if target is None else target[one]


def _check_same(inputs: Tensor, ranks: Ranks) -> None:
    """Check that all ranks of a sharded model give the same samples."""
    values = inputs.detach().double()
    told = torch.stack([values.sum(), values.square().sum(), torch.full_like(values.sum(), values.numel())])
    least, most = told.clone(), told.clone()
    ranks.take_smallest(least)
    ranks.take_largest(most)
    if not torch.equal(least, most):
        raise PlasticityError(
            "begin_task: expected the same batches on every rank of a sharded model, found different ones"
        )


def _output_of(model: nn.Module, inputs: Tensor) -> Tensor:
    output = model(inputs)
    if not isinstance(output, Tensor):
        raise PlasticityError(
            f"begin_task: expected a model whose output is a tensor, found a {type(output).__name__}"
        )
    return output


def _surprise(output: Tensor, target: Tensor | None, loss: Loss | None, generator: torch.Generator) -> Tensor:
    """Return -log p of a sample's label: of the given one, or of one drawn from the model's own output."""
    if loss is not None and target is not None:
        value = loss(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise PlasticityError("begin_task: expected a loss that is one number for a sample")
        return value.reshape(())
    if loss is not None:
        raise PlasticityError("begin_task: expected pairs of inputs and targets with a loss, found inputs")
    if output.dim() != 2 or output.shape[1] < 2:
        raise PlasticityError(
            "begin_task: labels are drawn from the model where no loss is given: expected outputs of shape "
            f"(1, classes), the logits, found {tuple(output.shape)}; give a loss, and targets with the inputs"
        )
    chances = output.detach().double().softmax(1).cumsum(1).cpu()
    drawn = torch.rand(1, 1, dtype=torch.float64, generator=generator) * chances[:, -1:]
    label = torch.searchsorted(chances, drawn, right=True).clamp_(max=output.shape[1] - 1)
    return -output.log_softmax(1)[0, int(label)]


def _gradients(value: Tensor, states: list[BioModule], sharded: bool) -> list[Tensor | None]:
    """Return the gradient on this rank's part of each weight, as the graph gives it."""
    if not value.requires_grad:
        raise PlasticityError(
            "begin_task: expected a model whose output has a gradient in evaluation too, found none; take "
            "torch.no_grad out of its forward, or freeze what it does not train"
        )
    if not sharded:
        return list(torch.autograd.grad(value, [state.weight for state in states], allow_unused=True))
    value.backward()
    weights = [state.weight for state in states]  # after a forward, and before the backward, they are whole
    gradients = [None if weight.grad is None else local(weight.grad) for weight in weights]
    for weight in weights:
        weight.grad = None
    return gradients


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation, and at the end back, with the gradients that it had."""
    modes = [(module, module.training) for module in model.modules()]
    held = [(parameter, parameter.grad) for parameter in model.parameters()]
    if any(is_sharded(parameter) for parameter, _ in held):
        for parameter, _ in held:
            parameter.grad = None
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training
        for parameter, gradient in held:
            parameter.grad = gradient
