"""What is done to a transformed model later: a cell compares with what the change means by definition."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import biofx
from durability.arriving import Arrived, Named, agree, arrived, batch, by_backward, loss_of, plain_net
from durability.measures import MEASURES, RULES, made, rules, stepped, untransformed
from durability.mechanisms import MECHANISMS, net, projected, summed
from durability.rounded import Rounded

Measure = Callable[[str], str]
MEANT = {**MECHANISMS, "rules": replace(MECHANISMS["rules"], between=summed, weight=projected)}
"""What the mechanisms are by definition; rules are tried with splits and signs, and turnover with masks."""


class Adapter(nn.Module):
    """A low-rank update around a layer, which shows its layer's weight as such wrappers do."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.full((1, base.in_features), 0.5))
        self.up = nn.Parameter(torch.full((base.out_features, 1), 0.5))

    @property
    def weight(self) -> Any:
        """The weight of the layer."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The bias of the layer."""
        return self.base.bias

    def forward(self, x: Tensor) -> Any:
        """Return what the layer returns, and the update."""
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


def adapter(name: str) -> str:
    """An adapter around the layer in the middle, whose own weight may be the layer's or the mechanism's."""
    mechanism, bio_model, x = MEANT[name], made(MECHANISMS[name]), batch(1)
    bio_model.eval()
    before = bio_model(x).detach()
    effective = mechanism.effective(bio_model)
    bio_model._modules["2"] = added = Adapter(bio_model.get_submodule("2"))
    found = bio_model(x)
    if torch.equal(found, before):
        return "LOST"
    for weight in (effective["2.weight"], added.base.weight.detach()):
        expected = net({**effective, "2.weight": weight + added.up @ added.down}, x, mechanism.between)
        gradient = torch.autograd.grad(loss_of(expected), added.up)[0]
        learned = torch.autograd.grad(loss_of(bio_model(x)), added.up)[0]
        if agree({"": found, "up": learned}, {"": expected.detach(), "up": gradient}, 1e-5):
            return "kept"
    return "WRONG"


def quantised(name: str) -> str:
    """The weights replaced by tensors of another class, which hold them in bytes."""
    mechanism, bio_model, x = MEANT[name], made(MECHANISMS[name]), batch(1)
    bio_model.eval()
    before = bio_model(x).detach()
    exact = copy.deepcopy(bio_model)
    for path in "024":
        layer = bio_model.get_submodule(path)
        rounded = Rounded.of(layer.weight.detach())
        exact.get_submodule(path).weight.data = rounded.whole()
        layer.weight = nn.Parameter(rounded, requires_grad=False)
    found = bio_model(x)
    expected = mechanism.output(exact, x)
    if agree({"": found}, {"": expected}, 1e-5):
        return "kept"
    return "LOST" if torch.equal(found, before) else "WRONG"


def run_of(bio_model: nn.Module, name: str) -> tuple[Any, Any, Any]:
    """A model, its optimizer, and what is attached to it."""
    optimizer = torch.optim.AdamW(bio_model.parameters(), lr=0.01)
    return bio_model, optimizer, biofx.attach(bio_model, optimizer, RULES if _has_rules(name) else ())


def _has_rules(name: str) -> bool:
    return MEASURES.get(name) is rules


def gone_on(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> Named:
    """The parameters after some steps."""
    for number in numbers:
        by_backward(model)(batch(number))
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def copied_run(name: str) -> str:
    """Model, optimizer and attachment copied together go on alike; the attachment alone is refused."""
    run = run_of(made(MECHANISMS[name]), name)
    gone_on(*run[:2], range(2))
    try:
        copy.deepcopy(run[2])
    except biofx.BiofxError:
        pass
    else:
        return "WRONG"
    model, optimizer, attachment = copy.deepcopy(run)
    plain = untransformed(model)
    without = gone_on(plain, torch.optim.AdamW(plain.parameters(), lr=0.01), range(2, 4))
    expected = gone_on(*run[:2], range(2, 4))
    if agree(without, expected, 1e-3):
        raise AssertionError("the plain model passes as well: the measurement says nothing")
    found = gone_on(model, optimizer, range(2, 4))
    alike = all(torch.equal(found[key], value) for key, value in expected.items())
    return "kept" if alike and attachment.steps == run[2].steps == 4 else "WRONG"


def normed_net() -> nn.Module:
    """The plain network with a normalisation behind its first layer."""
    return nn.Sequential(
        *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    )


def normed(eps: float, seen: list[Tensor]) -> Any:
    """That network by hand; ``seen`` gets the means of the normalisation and the outputs behind it."""

    def forward(p: Mapping[str, Tensor], x: Tensor, between: Callable[[Tensor], Tensor]) -> Tensor:
        y = between(F.linear(x, p["0.weight"], p["0.bias"]))
        centred = y - y.mean(0)
        y_normed = centred / (centred.square().mean(0) + eps).sqrt() * p["1.weight"] + p["1.bias"]
        h = F.relu(y_normed)
        seen.extend((y.mean(0).detach(), h.mean(0).detach()))
        h = F.relu(between(F.linear(h, p["3.weight"], p["3.bias"])))
        return F.linear(h, p["5.weight"], p["5.bias"])

    return forward


def norm_settings(name: str) -> str:
    """The normalisation's ``eps`` and ``momentum`` changed after the transform."""
    mechanism, bio_model, x = MEANT[name], made(MECHANISMS[name], normed_net), batch(1)
    first: list[Tensor] = []
    before = mechanism.output(bio_model, x, normed(1e-5, []))
    expected = mechanism.output(bio_model, x, normed(0.5, first))
    bio_model.get_submodule("1").eps = 0.5
    bio_model.get_submodule("1").momentum = 0.25
    if _has_rules(name):
        other = made(MECHANISMS[name], normed_net)
        changed = normed_net()
        changed[1].eps, changed[1].momentum = 0.5, 0.25  # type: ignore[index]
        meant = biofx.transform(changed, MECHANISMS[name].config).graph_module
        meant.load_state_dict(other.state_dict())
        return "kept" if agree(stepped(arrived(bio_model)), stepped(arrived(meant)), 1e-5) else "WRONG"
    gradients = mechanism.gradients(bio_model, x, normed(0.5, []))
    del gradients["0.bias"]  # the normalisation takes it out again, so that there is nothing but rounding
    found = bio_model(x)
    state = bio_model.state_dict()
    held = {"": found, "mean": state["1.running_mean"]}
    wanted = {"": expected, "mean": 0.25 * first[0]}
    if name == "activity":
        held["seen"], wanted["seen"] = state["0.bio_mod.activity"], first[1]
        gradients = {}
    if agree(held, wanted, 1e-5) and agree(by_backward(bio_model)(x), gradients, 1e-4):
        return "kept"
    return "LOST" if agree({"": found}, {"": before}, 1e-5) else "WRONG"


class OwnTrain(nn.Sequential):
    """The plain network, whose ``train()`` sets more than the flag."""

    def __init__(self) -> None:
        self.gain = 2.0
        super().__init__(*plain_net().children())

    def train(self, mode: bool = True) -> Any:
        """Set the mode, and how strong the input is."""
        self.gain = 2.0 if mode else 0.5
        return super().train(mode)

    def forward(self, x: Tensor) -> Any:
        """Return the outputs for the input times the gain."""
        x = x * self.gain
        for layer in self:
            x = layer(x)
        return x


def own_mode_switch(name: str) -> str:
    """A ``train()`` of the model's own, there and back and there."""
    mechanism, bio_model = MEANT[name], made(MECHANISMS[name], OwnTrain)
    for _ in range(2):
        bio_model.eval()
        found = bio_model(batch(1))
        if not agree({"": found}, {"": mechanism.output(bio_model, batch(1) / 2)}, 1e-5):
            doubled = mechanism.output(bio_model, batch(1) * 2)
            return "LOST" if agree({"": found}, {"": doubled}, 1e-5) else "WRONG"
        bio_model.train()
    if _has_rules(name):
        meant = made(MECHANISMS[name])
        twice = Arrived(meant, lambda x: by_backward(meant)(x * 2), meant)
        return "kept" if agree(stepped(arrived(bio_model)), stepped(twice), 1e-5) else "WRONG"
    if name == "activity":
        bio_model(batch(1))
        layer = F.linear(batch(1) * 2, bio_model.get_submodule("0").weight, bio_model.get_submodule("0").bias)
        held = bio_model.get_submodule("0").bio_mod.activity
        return "kept" if agree({"": held}, {"": F.relu(layer).mean(0).detach()}, 1e-5) else "WRONG"
    expected = mechanism.gradients(bio_model, batch(1) * 2)
    return "kept" if agree(by_backward(bio_model)(batch(1)), expected, 1e-5) else "WRONG"


CHANGES: dict[str, Measure] = {
    "adapter": adapter,
    "quantised": quantised,
    "copied run": copied_run,
    "norm settings changed": norm_settings,
    "mode by own train()": own_mode_switch,
}
