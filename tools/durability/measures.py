"""Each mechanism compared with its definition, and with the plain network, after a journey."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import biofx
from durability.arriving import Arrived, Named, agree, arrived, batch, by_backward, plain_net
from durability.journeys import accumulated, per_sample
from durability.mechanisms import Mechanism

RULES = ["crystallize", "volume_dependent_lr", "synaptic_scaling", "rejuvenate_weights"]


def made(mechanism: Mechanism, plain: Callable[[], nn.Module] = plain_net) -> Any:
    """A transformed model with weights of any sign, in training; gains of normalisations are positive."""
    torch.manual_seed(3)
    bio_model, _ = biofx.transform(plain(), mechanism.config)
    with torch.no_grad():
        for name, parameter in bio_model.named_parameters():
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.uniform_(0.5, 1.5) if is_gain else parameter.normal_(std=0.5)
    return bio_model


def untransformed(bio_model: nn.Module, make: Callable[[], nn.Module] = plain_net) -> nn.Module:
    """The plain network with the same weights, whose layers may be wider than the original's."""
    plain = make()
    for name, parameter in bio_model.named_parameters():
        if "bio_mod" in name:  # of several weights for each connection the plain network knows the first
            continue
        plain.get_submodule(name.partition(".")[0]).register_parameter(
            name.partition(".")[2], nn.Parameter(parameter.detach().clone())
        )
    return plain


def values_and_gradients(mechanism: Mechanism, journey: Callable[[nn.Module], Arrived]) -> str:
    """Compare output and gradients with the definition, and with the plain network."""
    bio_model = made(mechanism)
    x = batch(1)
    output, gradients = mechanism.output(bio_model, x), mechanism.gradients(bio_model, x)
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


MEASURES = {"activity": activity, "rules": rules, "turnover": rules}
