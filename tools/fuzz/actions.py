"""What the lines of changes call, on a plain model and on a transformed one alike."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune  # noqa: F401 (used by lines)
from torch.optim.swa_utils import AveragedModel
from torch.utils import checkpoint

import biofx
from fuzz.models import Low


class Doubled(nn.Module):
    """Another class around a layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return twice what the layer returns."""
        output = self.base(*args, **kwargs)
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return half of it."""
        return weight / 2


def at(model: Any, path: str) -> Any:
    """The module at a path; the model itself at none."""
    return model.get_submodule(path)


def put(model: nn.Module, path: str, module: nn.Module | None) -> None:
    """Replace a module, as an assignment to its parent does."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def adapted(model: nn.Module, path: str) -> None:
    """Put a low-rank wrapper around a linear layer."""
    base: Any = model.get_submodule(path)
    put(model, path, Low(base))


def again(model: nn.Module) -> Any:
    """Send a model through pickle."""
    return pickle.loads(pickle.dumps(model))


def filed(model: nn.Module) -> Any:
    """Send a model through a file of torch's."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def is_ours(model: nn.Module) -> bool:
    """Whether it is a transformed model."""
    return isinstance(model, biofx.BioGraphModule)


def checkpointed(model: nn.Module, *, sharded: bool = False) -> None:
    """Save, forget the values, and load them again."""
    if not is_ours(model):
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "saved")
        (biofx.checkpoints.save_sharded if sharded else biofx.save)(model, path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        (biofx.checkpoints.load_sharded if sharded else biofx.load)(path, model)


def deployed(model: nn.Module) -> Any:
    """The plain model that a transformed one amounts to."""
    return biofx.deploy(model) if is_ours(model) else model


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, rules: Sequence[str] = ()) -> Any:
    """Attach plasticity where there is a transformed model."""
    return biofx.attach(model, optimizer, rules) if is_ours(model) else None


def trained(
    model: nn.Module,
    make: Callable[[Any], torch.optim.Optimizer],
    x: Tensor,
    *,
    steps: int = 1,
    attached: bool = False,
    then: Callable[[torch.optim.Optimizer], Any] | None = None,
    rules: Sequence[str] = (),
) -> None:
    """Take steps with a new optimizer, to which something happens ``then``, before the first."""
    optimizer = make(model.parameters())
    attachment = attach(model, optimizer, rules) if attached or rules else None
    if then is not None:
        then(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    optimizer.zero_grad()
    if attachment is not None:
        attachment.detach()


def run_copied(model: nn.Module, make: Callable[[Any], torch.optim.Optimizer], x: Tensor) -> Any:
    """Copy a model with its optimizer and what is attached, take a step of the copy, and return it."""
    optimizer = make(model.parameters())
    copied, copied_optimizer, attachment = copy.deepcopy((model, optimizer, attach(model, optimizer)))
    copied_optimizer.zero_grad()
    loss_of(copied(x)).backward()
    copied_optimizer.step()
    copied_optimizer.zero_grad()
    if attachment is not None:
        attachment.detach()
    return copied


def loss_of(output: Any) -> Tensor:
    """A loss that depends on all of the output."""
    parts = output if isinstance(output, (tuple, list)) else [output]
    return torch.stack([(part - 0.5).square().sum() for part in parts]).sum()


def averaged(model: nn.Module, x: Tensor, **options: Any) -> Any:
    """Average a model with what two steps make of it, as torch's averaging does."""
    mean = AveragedModel(model, **options)
    for _ in range(2):
        trained(model, lambda parameters: torch.optim.SGD(parameters, lr=0.05), x)
        mean.update_parameters(model)
    return mean.module


def averaged_by_name(model: nn.Module, x: Tensor, decay: float = 0.5) -> Any:
    """Average a model with what two steps make of it, state entry by state entry."""
    mean = copy.deepcopy(model)
    for _ in range(2):
        trained(model, lambda parameters: torch.optim.SGD(parameters, lr=0.05), x)
        state = model.state_dict()
        with torch.no_grad():
            for name, value in mean.state_dict().items():
                value.copy_(decay * value + (1 - decay) * state[name])
    return mean


def penalised(model: nn.Module, x: Tensor) -> Tensor:
    """The gradient of a gradient's norm, by the first parameter."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    first = torch.autograd.grad(loss_of(model(x)), parameters, create_graph=True, allow_unused=True)
    return torch.stack([gradient.square().sum() for gradient in first if gradient is not None]).detach()


def recomputed(model: nn.Module, x: Tensor) -> Any:
    """Call a model under checkpointing."""
    return checkpoint.checkpoint(model, x, use_reentrant=False)
