"""What a model is sent through."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import biofx
from biofx.rewriting.plain_passes import config_from_plain
from durability.arriving import (
    Arrived,
    Named,
    arrived,
    batch,
    by_backward,
    loss_of,
    named_gradients,
    plain_net,
)

Journey = Callable[[nn.Module], Arrived]


def through(file_format: Any) -> Callable[[nn.Module], Arrived]:
    """Return the journey through a file."""

    def journey(bio_model: nn.Module) -> Arrived:
        file = io.BytesIO()
        file_format[0](bio_model, file)
        file.seek(0)
        return arrived(file_format[1](file))

    return journey


def state_dict(bio_model: nn.Module) -> Arrived:
    """Load the state into a model that was transformed in the same way from other weights."""
    record: Any = bio_model.transform_record
    other, _ = biofx.transform(plain_net(), config_from_plain(record.steps[0].config))
    other.load_state_dict(bio_model.state_dict())
    return arrived(other)


def compiled(bio_model: nn.Module) -> Arrived:
    """Compile; the backend that runs what autograd and the compiler made of the graph."""
    torch._dynamo.reset()
    made: Any = torch.compile(bio_model, backend="aot_eager", fullgraph=True)
    return Arrived(made, by_backward(bio_model, made), made)


def compiled_by_backend(bio_model: nn.Module) -> Arrived:
    """Compile a plain model of the same weights with biofx as the backend, and take over the state."""
    torch._dynamo.reset()
    record: Any = bio_model.transform_record
    config = config_from_plain(record.steps[0].config)
    backend = biofx.backend(config, then="aot_eager", initialise=True)
    model = plain_net()
    made: Any = torch.compile(model, backend=backend, fullgraph=True)
    made(batch(0))
    companion = biofx.companion(made)
    companion.load_state_dict(bio_model.state_dict())
    return Arrived(made, by_backward(model, made), companion)


def of_a_program(bio_model: nn.Module) -> Arrived:
    """Export a plain model, and let biofx transform the program."""
    record: Any = bio_model.transform_record
    program = torch.export.export(plain_net(), (batch(0),))
    made, _ = biofx.transform(program, config_from_plain(record.steps[0].config))
    made.load_state_dict(bio_model.state_dict())
    return arrived(made)


def exported(bio_model: nn.Module) -> Arrived:
    """Export, and take the program's module."""
    return arrived(torch.export.export(bio_model, (batch(0),)).module())


def per_sample(bio_model: nn.Module) -> Arrived:
    """Gradients of each sample by itself, summed."""
    named = dict(bio_model.named_parameters())
    buffers = dict(bio_model.named_buffers())

    def loss(parameters: Named, x: Tensor) -> Tensor:
        return loss_of(functional_call(bio_model, (parameters, buffers), (x[None],)))

    def gradients(x: Tensor) -> Named:
        detached = {name: parameter.detach() for name, parameter in named.items()}
        each = vmap(grad(loss), in_dims=(None, 0))(detached, x)
        return {name: gradient.sum(0) for name, gradient in each.items()}

    return Arrived(lambda x: vmap(lambda one: bio_model(one[None])[0])(x), gradients, bio_model)


def functional(bio_model: nn.Module) -> Arrived:
    """Call with parameters from elsewhere."""

    def call(x: Tensor) -> tuple[Tensor, Named]:
        values = {name: p.detach().clone().requires_grad_() for name, p in bio_model.named_parameters()}
        output: Tensor = functional_call(bio_model, values, (x,))
        return output, values

    def gradients(x: Tensor) -> Named:
        output, values = call(x)
        found = torch.autograd.grad(loss_of(output), list(values.values()))
        return dict(zip(values, found, strict=True))

    return Arrived(lambda x: call(x)[0], gradients, bio_model)


def autocast(bio_model: nn.Module) -> Arrived:
    """Compute in bfloat16 where autocast does."""

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return bio_model(x).float()  # type: ignore[no-any-return]

    return Arrived(call, by_backward(bio_model, call), bio_model, tolerance=0.1)


def scaled_loss(bio_model: nn.Module) -> Arrived:
    """Scale the loss up and the gradients down again."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def gradients(x: Tensor) -> Named:
        bio_model.zero_grad()
        optimizer = torch.optim.SGD(bio_model.parameters(), lr=0.0)
        scaler.scale(loss_of(bio_model(x))).backward()
        scaler.unscale_(optimizer)
        scaler.update()
        return named_gradients(bio_model)

    return Arrived(bio_model, gradients, bio_model)


def accumulated(bio_model: nn.Module) -> Arrived:
    """Add up the gradients of two half batches."""

    def gradients(x: Tensor) -> Named:
        bio_model.zero_grad()
        for half in x.chunk(2):
            loss_of(bio_model(half)).backward()
        return named_gradients(bio_model)

    return Arrived(bio_model, gradients, bio_model)


def clipped(bio_model: nn.Module) -> Arrived:
    """Clip the norm of the gradients, and undo it to compare."""

    def gradients(x: Tensor) -> Named:
        by_backward(bio_model)(x)
        norm = torch.nn.utils.clip_grad_norm_(bio_model.parameters(), 0.1)
        for parameter in bio_model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(norm / 0.1)
        return named_gradients(bio_model)

    return Arrived(bio_model, gradients, bio_model, tolerance=1e-4)


def checkpointed(bio_model: nn.Module) -> Arrived:
    """Compute the forward a second time during backward."""

    def call(x: Tensor) -> Tensor:
        output: Tensor = checkpoint(bio_model, x, use_reentrant=False)
        return output

    return Arrived(call, by_backward(bio_model, call), bio_model)


def averaged(bio_model: nn.Module) -> Arrived:
    """Keep a moving average, here of equal models."""
    average = AveragedModel(bio_model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    average.update_parameters(bio_model)
    average.update_parameters(bio_model)
    return arrived(average.module)


def with_late_state(bio_model: nn.Module) -> None:
    """Let a rule run that keeps a state of its own, and put the weights back."""
    weights = {name: value.detach().clone() for name, value in bio_model.named_parameters()}
    optimizer = torch.optim.SGD(bio_model.parameters(), lr=0.0)
    attachment = biofx.attach(bio_model, optimizer, ["synaptic_scaling"])
    by_backward(bio_model.eval())(batch(0))
    optimizer.step()
    optimizer.zero_grad()
    attachment.detach()
    bio_model.train().load_state_dict(weights, strict=False)


def shifted(bio_model: nn.Module, by: float) -> nn.Module:
    """Move all parameters."""
    with torch.no_grad():
        for parameter in bio_model.parameters():
            parameter.add_(by)
    return bio_model


def averaged_by_position(bio_model: nn.Module) -> Arrived:
    """Average, buffers too, with an average that was made before a rule ran; of models around this one."""
    average = AveragedModel(bio_model, avg_fn=lambda mean, new, count: (mean + new) / 2, use_buffers=True)
    with_late_state(bio_model)
    average.update_parameters(shifted(bio_model, 0.25))
    average.update_parameters(shifted(bio_model, -0.5))
    return arrived(average.module)


def averaged_by_name(bio_model: nn.Module) -> Arrived:
    """Average whatever the state dict has, into a copy that was made before a rule ran."""
    average = copy.deepcopy(shifted(bio_model, 0.25))
    with_late_state(shifted(bio_model, -0.25))
    state = shifted(bio_model, -0.25).state_dict()
    with torch.no_grad():
        for name, value in average.state_dict().items():
            value.copy_(0.5 * value + 0.5 * state[name])
    return arrived(average)


def on_meta(bio_model: nn.Module) -> Arrived:
    """Go to the device without values, come back empty, and load the state."""
    state = copy.deepcopy(bio_model.state_dict())
    back = copy.deepcopy(bio_model).to("meta").to_empty(device="cpu")
    back.load_state_dict(state)
    return arrived(back)


def doubled(bio_model: nn.Module) -> Arrived:
    """Compute in another type of number, with inputs of it."""
    made = copy.deepcopy(bio_model).double()
    back = by_backward(made, lambda x: made(x.double()))
    return Arrived(
        lambda x: made(x.double()).float(), lambda x: {name: g.float() for name, g in back(x).items()}, made
    )


def ddp(bio_model: nn.Module) -> Arrived:
    """Wrap in DistributedDataParallel."""
    wrapped = DistributedDataParallel(bio_model)
    return Arrived(wrapped, by_backward(wrapped), wrapped)


def fsdp2(bio_model: nn.Module) -> Arrived:
    """Shard parameters, gradients and the optimizer's state."""
    fully_shard(bio_model)
    return arrived(bio_model)


def on_cuda_graph(bio_model: nn.Module) -> Arrived:
    """Capture a forward and its backward in a CUDA graph, and replay it."""
    bio_model = copy.deepcopy(bio_model).cuda()
    x = torch.empty_like(batch(1), device="cuda")

    def one_pass() -> Tensor:
        output: Tensor = bio_model(x)
        loss_of(output).backward()
        return output

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        one_pass()
    torch.cuda.current_stream().wait_stream(aside)
    bio_model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = one_pass()

    def replayed(given: Tensor) -> Tensor:
        x.copy_(given)
        graph.replay()
        return output.detach().cpu()

    def gradients(given: Tensor) -> Named:
        replayed(given)
        return {name: gradient.cpu() for name, gradient in named_gradients(bio_model).items()}

    return Arrived(replayed, gradients, bio_model)


def hsdp(bio_model: nn.Module) -> Arrived:
    """Shard along one dimension of a mesh, and hold replicas along the other."""
    fully_shard(bio_model, mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard")))
    return arrived(bio_model)


def in_parts(bio_model: nn.Module) -> Arrived:
    """Let ranks compute parts of the first two layers, and shard these."""
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    parallelize_module(bio_model, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(bio_model, mesh=mesh["data"])
    return arrived(bio_model)


JOURNEYS: dict[str, Callable[[nn.Module], Arrived]] = {
    "copy.deepcopy": lambda model: arrived(copy.deepcopy(model)),
    "pickle": through((pickle.dump, pickle.load)),
    "torch.save, torch.load": through((torch.save, lambda file: torch.load(file, weights_only=False))),
    "state dict": state_dict,
    "fx.symbolic_trace": lambda model: arrived(torch.fx.symbolic_trace(model)),
    "fx.Transformer": lambda model: arrived(torch.fx.Transformer(model).transform()),  # type: ignore[arg-type]
    "torch.compile": compiled,
    "torch.compile(backend=biofx)": compiled_by_backend,
    "torch.export": exported,
    "ExportedProgram in": of_a_program,
    "vmap(grad)": per_sample,
    "functional_call": functional,
    "autocast bfloat16": autocast,
    "GradScaler": scaled_loss,
    "accumulation": accumulated,
    "clipping": clipped,
    "checkpointing": checkpointed,
    "EMA copy": averaged,
    "average by position": averaged_by_position,
    "average by name": averaged_by_name,
    ".to(float64)": doubled,
    ".to(meta) and back": on_meta,
    "DataParallel": lambda model: arrived(DataParallel(model)),
    "DDP": ddp,
    "FSDP2": fsdp2,
    "HSDP": hsdp,
    "tensor parallel": in_parts,
    "CUDA graph": on_cuda_graph,
}
NEEDS_A_GPU = ("CUDA graph",)
"""Journeys that cannot be made where there is no CUDA device."""
