"""What survives what: every mechanism through everything that happens to a model, measured.

``python tools/durability.py`` prints the table, with ``-v`` what was raised in each cell. A cell compares
outputs and gradients with the mechanism's definition, written out by hand below, after making sure that the
plain model would not pass.

kept     outputs and gradients are those of the definition
refused  biofx raises an error that says why and what to do
idle     the mechanism does nothing there, by design: see the notes
LOST, WRONG, CRASH  what must not be in the table
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import biofx
from biofx.plain_passes import config_from_plain
from biofx.plasticity.model_rules import bio_modules

NOTES = """\
kept: outputs and gradients are those of the mechanism's definition, written out by hand; refused: an error
says why and what to do; idle: nothing is observed where inputs are no batches (torch.func)."""

RULES = ["crystallize", "volume_dependent_lr", "synaptic_scaling", "rejuvenate_weights"]
Named = dict[str, Tensor]
Gradients = Callable[[Tensor], Named]


@dataclass
class Arrived:
    """A model after its journey: how it computes, and what rules can be attached to."""

    forward: Callable[[Tensor], Tensor]
    gradients: Gradients
    module: nn.Module
    tolerance: float = 1e-5


def loss_of(output: Tensor) -> Tensor:
    """The loss whose gradients are compared."""
    return (output - 1).square().sum()


def named_gradients(module: nn.Module) -> Named:
    """Gradients by the names that the original gave the parameters."""
    found = {}
    for name, parameter in module.named_parameters():
        gradient: Any = parameter.grad
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found[name.removeprefix("module.").removeprefix("_orig_mod.")] = whole
    return found


def by_backward(module: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> Gradients:
    """Gradients as a training loop gets them."""

    def gradients(x: Tensor) -> Named:
        module.zero_grad()
        loss_of((module if call is None else call)(x)).backward()
        return named_gradients(module)

    return gradients


def arrived(module: nn.Module) -> Arrived:
    """Return what is called and trained as ever."""
    return Arrived(module, by_backward(module), module)


def plain_net() -> nn.Module:
    """Three layers; the random state decides the weights."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))


# the mechanisms: a config, and the definition


def pooled(y: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """Each channel replaced by the sum over its pair."""
    pairs = activation(y).reshape(len(y), -1, 2).sum(2)
    return torch.stack([pairs, pairs], 2).reshape(y.shape)


def net(p: Mapping[str, Tensor], x: Tensor, between: Callable[[Tensor], Tensor]) -> Tensor:
    """The plain network, with something behind its hidden layers."""
    y = F.relu(between(F.linear(x, p["0.weight"], p["0.bias"])))
    y = F.relu(between(F.linear(y, p["2.weight"], p["2.bias"])))
    return F.linear(y, p["4.weight"], p["4.bias"])


def signs_of(bio_model: nn.Module) -> Named:
    """The sign of each weight's unit, laid out like the weight; 0 where free."""
    return {
        path: torch.zeros(()) if state.signs() is None else state.signs()
        for path, state in bio_modules(bio_model).items()
    }


def projected(weight: Tensor, sign: Tensor) -> Tensor:
    """A weight with the wrong signs set to 0."""
    return torch.where(weight * sign < 0, torch.zeros_like(weight), weight)


def mirrored(weight: Tensor, sign: Tensor) -> Tensor:
    """A weight with the wrong signs turned round."""
    return torch.where(sign == 0, weight, weight.abs() * sign)


def outward(weight: Tensor, gradient: Tensor, sign: Tensor) -> Tensor:
    """The gradient of projected descent: nothing drives a weight further out."""
    return torch.where((weight * sign <= 0) & (gradient * sign > 0), torch.zeros_like(gradient), gradient)


@dataclass(frozen=True)
class Mechanism:
    """One mechanism by itself: the config that switches it on, and what it is by definition."""

    config: dict[str, Any]
    between: Callable[[Tensor], Tensor] = lambda y: y
    weight: Callable[[Tensor, Tensor], Tensor] = lambda w, sign: w
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor] = lambda w, g, sign: g
    scaled: bool = False

    def output(self, bio_model: nn.Module, x: Tensor) -> Tensor:
        """Return the output by definition."""
        return self._run(bio_model, x)[0]

    def gradients(self, bio_model: nn.Module, x: Tensor) -> Named:
        """Return the gradients by definition."""
        output, effective, raw = self._run(bio_model, x)
        names = list(effective)
        found = torch.autograd.grad(loss_of(output), [effective[name] for name in names])
        signs, result = signs_of(bio_model), dict(zip(names, found, strict=True))
        for name, sign in signs.items():
            result[name] = self.gradient(raw[name], result[name], sign)
            if self.scaled:
                state: Any = bio_model.get_submodule(name.replace("weight", "bio_mod"))
                result[name] = result[name] * state.fuzzy_learning_rate_parameters
        return result

    def _run(self, bio_model: nn.Module, x: Tensor) -> tuple[Tensor, Named, Named]:
        raw = {name: parameter.detach() for name, parameter in bio_model.named_parameters()}
        signs = signs_of(bio_model)
        effective = {
            name: (self.weight(value, signs[name]) if name in signs else value).clone().requires_grad_()
            for name, value in raw.items()
        }
        return net(effective, x, self.between), effective, raw


OFF: dict[str, Any] = {"fuzzy_lr_distribution": "baseline"}
DALE: dict[str, Any] = {**OFF, "apply_dales_principle": True, "dales_constrain_readout": True}
MECHANISMS = {
    "split": Mechanism({**OFF, "weight_splitting_Gamma": 2}, between=lambda y: pooled(y, lambda z: z)),
    "split, tanh": Mechanism(
        {**OFF, "weight_splitting_Gamma": 2, "weight_splitting_activation_function": torch.tanh},
        between=lambda y: pooled(y, torch.tanh),
    ),
    "signs": Mechanism(DALE, weight=projected, gradient=outward),
    "signs, abs": Mechanism(
        {**DALE, "dales_method": "abs"},
        weight=mirrored,
        gradient=lambda w, g, sign: torch.where(sign == 0, g, g * sign * w.sign()),
    ),
    "signs, expand": Mechanism({**DALE, "dales_method": "expand"}, weight=projected, gradient=outward),
    "factors": Mechanism({"fuzzy_learning_rate_factor_nu": 0.4}, scaled=True),
    "from seed": Mechanism({"fuzzy_learning_rate_factor_nu": 0.4, "fuzzy_lr_dtype": "seed"}, scaled=True),
    "activity": Mechanism({"fuzzy_lr_distribution": "activity", "fuzzy_lr_dynamic": True}),
    "rules": Mechanism({"weight_splitting_Gamma": 2, "apply_dales_principle": True}),
}


# the journeys


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


JOURNEYS: dict[str, Callable[[nn.Module], Arrived]] = {
    "copy.deepcopy": lambda model: arrived(copy.deepcopy(model)),
    "pickle": through((pickle.dump, pickle.load)),
    "torch.save, torch.load": through((torch.save, lambda file: torch.load(file, weights_only=False))),
    "state dict": state_dict,
    "fx.symbolic_trace": lambda model: arrived(torch.fx.symbolic_trace(model)),
    "fx.Transformer": lambda model: arrived(torch.fx.Transformer(model).transform()),  # type: ignore[arg-type]
    "torch.compile": compiled,
    "torch.export": exported,
    "vmap(grad)": per_sample,
    "functional_call": functional,
    "autocast bfloat16": autocast,
    "GradScaler": scaled_loss,
    "accumulation": accumulated,
    "clipping": clipped,
    "checkpointing": checkpointed,
    "EMA copy": averaged,
    ".to(float64)": doubled,
    ".to(meta) and back": on_meta,
    "DataParallel": lambda model: arrived(DataParallel(model)),
    "DDP": ddp,
    "FSDP2": fsdp2,
}


# the measurements


def batch(number: int) -> Tensor:
    """A batch of 8 samples."""
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(number))


def made(mechanism: Mechanism) -> nn.Module:
    """A transformed model with weights of any sign, in training."""
    torch.manual_seed(3)
    bio_model, _ = biofx.transform(plain_net(), mechanism.config)
    with torch.no_grad():
        for parameter in bio_model.parameters():
            parameter.normal_(std=0.5)
    return bio_model


def untransformed(bio_model: nn.Module) -> nn.Module:
    """The plain network with the same weights, whose layers may be wider than the original's."""
    plain = plain_net()
    for name, parameter in bio_model.named_parameters():
        plain.get_submodule(name.partition(".")[0]).register_parameter(
            name.partition(".")[2], nn.Parameter(parameter.detach().clone())
        )
    return plain


def agree(found: Mapping[str, Any], expected: Mapping[str, Tensor], tolerance: float) -> bool:
    """Whether tensors are equal up to a fraction of the largest entry."""
    return found.keys() >= expected.keys() and all(
        found[name] is not None
        and bool((found[name].detach() - value).abs().max() <= tolerance * (1e-6 + value.abs().max()))
        for name, value in expected.items()
    )


def values_and_gradients(mechanism: Mechanism, journey: Callable[[nn.Module], Arrived]) -> str:
    """Compare output and gradients with the definition, and with the plain network."""
    bio_model = made(mechanism)
    x = batch(1)
    output, gradients = mechanism.output(bio_model, x).detach(), mechanism.gradients(bio_model, x)
    if journey is per_sample:  # signs hold back what drives a weight outwards for each sample by itself
        each = [mechanism.gradients(bio_model, one[None]) for one in x]
        gradients = {name: torch.stack([one[name] for one in each]).sum(0) for name in gradients}
    untouched = by_backward(untransformed(bio_model))(x)
    after = journey(bio_model)
    if agree(untouched, gradients, max(after.tolerance, 1e-3)):
        raise AssertionError("the plain model passes as well: the measurement says nothing")
    found = after.gradients(x)
    if agree({"output": after.forward(x)}, {"output": output}, after.tolerance) and agree(
        found, gradients, after.tolerance
    ):
        return "kept"
    return "LOST" if agree(found, untouched, after.tolerance) else "WRONG"


def activity(mechanism: Mechanism, journey: Callable[[nn.Module], Arrived]) -> str:
    """Train on two batches, and compare what has been seen of the first layer's units with their outputs."""
    bio_model = made(mechanism)
    batches = [batch(1), batch(2)]
    if journey is accumulated:
        batches = [half for whole in batches for half in whole.chunk(2)]
    seen = [F.relu(bio_model.get_submodule("0")(x)).detach().mean(0) for x in batches]
    expected = seen[0]
    for mean in seen[1:]:
        expected = 0.9 * expected + 0.1 * mean
    after = journey(bio_model)
    for number in (1, 2):
        after.gradients(batch(number))
    held = [value for key, value in after.module.state_dict().items() if key.endswith("0.bio_mod.activity")]
    if not held:
        return "LOST"
    if (held[0] < 0).all():
        return "idle" if journey is per_sample else "LOST"
    return "kept" if agree({"a": held[0]}, {"a": expected}, after.tolerance) else "WRONG"


def stepped(after: Arrived) -> Named:
    """The weights after some steps with every rule attached."""
    optimizer = torch.optim.SGD(after.module.parameters(), lr=0.01)
    attachment = biofx.attach(after.module, optimizer, RULES)
    for number in range(3):
        gradients = after.gradients(batch(number))
        for name, parameter in after.module.named_parameters():
            if parameter.grad is None:
                parameter.grad = gradients[name]
        optimizer.step()
        optimizer.zero_grad()
    attachment.detach()
    return {
        name.removeprefix("module.").removeprefix("_orig_mod."): value.detach()
        if not hasattr(value, "full_tensor")
        else value.full_tensor().detach()
        for name, value in after.module.named_parameters()
    }


def rules(mechanism: Mechanism, journey: Callable[[nn.Module], Arrived]) -> str:
    """Train with every rule, and compare with a model that has not been on the journey."""
    bio_model = made(mechanism)
    still = copy.deepcopy(bio_model)
    expected = stepped(arrived(still))
    untouched = arrived(copy.deepcopy(bio_model))
    optimizer = torch.optim.SGD(untouched.module.parameters(), lr=0.01)
    for number in range(3):
        untouched.gradients(batch(number))
        optimizer.step()
    after = journey(bio_model)
    found = stepped(after)
    without = dict(untouched.module.named_parameters())
    if agree(without, expected, after.tolerance):
        raise AssertionError("a model without rules passes as well: the measurement says nothing")
    if agree(found, expected, after.tolerance):
        return "kept"
    return "LOST" if agree(found, without, after.tolerance) else "WRONG"


MEASURES = {"activity": activity, "rules": rules}


@contextmanager
def one_process_group() -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def measure(name: str, journey: Callable[[nn.Module], Arrived], *, verbose: bool = False) -> str:
    """Return what goes into one cell, with the error if there is one and it is asked for."""
    mechanism = MECHANISMS[name]
    try:
        return MEASURES.get(name, values_and_gradients)(mechanism, journey)
    except biofx.BiofxError as error:
        return f"refused: {error}" if verbose else "refused"
    except AssertionError:
        raise
    except Exception as error:
        return f"CRASH: {type(error).__name__}: {error}" if verbose else "CRASH"


def table(*, verbose: bool = False) -> str:
    """Measure everything and return the table."""
    torch.set_num_threads(1)
    columns = list(MECHANISMS)
    rows = [["", *columns]]
    with warnings.catch_warnings(), one_process_group():
        warnings.simplefilter("ignore")
        for name, journey in JOURNEYS.items():
            rows.append([name, *(measure(column, journey, verbose=verbose) for column in columns)])
    widths = [max(len(row[place]) for row in rows) for place in range(len(columns) + 1)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


if __name__ == "__main__":
    print(f"{table(verbose='-v' in sys.argv)}\n\n{NOTES}")
