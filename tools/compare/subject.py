"""The network that is compared on, and how to look into it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def network(width: int = 80) -> nn.Sequential:
    """Return an MLP of three layers with weights on both sides of 1."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, width), nn.ReLU(), nn.Linear(width, 60), nn.ReLU(), nn.Linear(60, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    return model


def layer_at(model: nn.Module, path: str) -> nn.Linear:
    """Return a layer."""
    found = model.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found


def state_of(model: nn.Module, path: str) -> Any:
    """Return what a layer keeps of its plasticity."""
    return model.get_submodule(path).bio_mod


def call(model: object, method: str) -> None:
    """Call a method that a package put on a model or a layer."""
    getattr(model, method)()


def layer_as_used(model: nn.Module, path: str) -> Tensor:
    """Return the weight that a rewritten layer uses: the input of its linear node, evaluated."""
    graph_module: Any = copy.deepcopy(model)
    node = next(n for n in graph_module.graph.nodes if n.name == f"_{path}")
    output = next(n for n in graph_module.graph.nodes if n.op == "output")
    output.args = (node.args[1],)
    graph_module.graph.lint()
    graph_module.recompile()
    weight: Tensor = graph_module(torch.zeros(1, 40)).detach()
    return weight
