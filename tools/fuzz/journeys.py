"""What a model is sent through between changes: copies, files, state dicts, other batches, other contexts."""

from __future__ import annotations

from random import Random

from torch import nn

from fuzz.module_changes import Change

COPIES = (
    "m = copy.deepcopy(m)",
    "m = copy.copy(m)",
    "m = again(m)",
    "m = filed(m)",
    "checkpointed(m)",
    "checkpointed(m, sharded=True)",
    "m, _ = copy.deepcopy((m, x))",
)
STATES = (
    "m.load_state_dict(m.state_dict())",
    "m.load_state_dict({name: value.clone() for name, value in m.state_dict().items()}, assign=True)",
    "other = fresh(); other.load_state_dict(m.state_dict()); m = other.train(m.training)",
    "other = copy.deepcopy(m); other.load_state_dict(m.state_dict()); m = other",
    "m.load_state_dict({name: value * 0.5 if value.is_floating_point() and 'bio_mod' not in name else value "
    "for name, value in m.state_dict().items()})",
    "see([name for name in m.state_dict() if 'bio_mod' not in name])",
    "m.load_state_dict({name: value for name, value in m.state_dict().items() if 'bias' not in name}, "
    "strict=False)",
)
PROBES = (
    "with torch.no_grad(): see(m(x))",
    "with torch.inference_mode(): see(m(x))",
    "with torch.autocast('cpu', torch.bfloat16): see(m(x))",
    "twice = {name: value.detach() * 2 for name, value in m.named_parameters()}\n"
    "see(torch.func.functional_call(m, twice, (x,)))",
    "see(recomputed(m, x))",
    "see(penalised(m, x))",
    "m.eval(); see(m(x)); m.train(); see(m(x))",
    "x = x.requires_grad_() if x.is_floating_point() else x",
    "see([type(each).__name__ for each in m.children()])",
    "see([name for name, _ in m.named_parameters()])",
    "y = x\nfor each in m: y = each(y)\nsee(y)",
    "m.eval(); see(deployed(m)(x))",
    "see(m[0](x))",
    "see(m[:2](x))",
)


def size(rng: Random, model: nn.Module) -> str | None:
    """Another number of samples."""
    return f"x = batch({rng.choice((1, 2, 7, 0, 4))})"


def copied(rng: Random, model: nn.Module) -> str | None:
    """A copy, or a file."""
    return rng.choice(COPIES)


def state(rng: Random, model: nn.Module) -> str | None:
    """A state dict, to itself, to a copy, or to a model that was made in the same way."""
    return rng.choice(STATES)


def probe(rng: Random, model: nn.Module) -> str | None:
    """A call in another context."""
    return rng.choice(PROBES)


JOURNEYS: tuple[Change, ...] = (size, size, copied, copied, state, state, probe, probe)
