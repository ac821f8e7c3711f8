"""Spiking networks of the packages for computational neuroscience that are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """Yield names and builders of networks with sequences ``(time, batch, features)`` for each."""
    for package, found in (("snntorch", _snntorch), ("spikingjelly", _spikingjelly), ("norse", _norse)):
        if importlib.util.find_spec(package) is not None:
            for name, make in found():
                yield f"{package} {name}", lambda make=make: (_seeded(make), _sequences)  # type: ignore[misc]


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def _sequences(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    length = 7 if batch == 4 else 5
    values: Tensor = 2 * torch.randn(length, batch, 8, generator=torch.Generator().manual_seed(batch))
    return (values,), {}


class _Steps(nn.Module):
    """Two layers of neurons whose states the forward hands from step to step."""

    def __init__(self, make: Callable[[], Any], start: str) -> None:
        super().__init__()
        self.inwards, self.outwards = nn.Linear(8, 10), nn.Linear(10, 4)
        self.first, self.second, self._start = make(), make(), start

    def forward(self, x: Tensor) -> Any:
        states = [_entries(getattr(neuron, self._start)()) for neuron in (self.first, self.second)]
        outputs = []
        for step in x:
            spikes, *states[0] = self.first(self.inwards(step), *states[0])
            spikes, *states[1] = self.second(self.outwards(spikes), *states[1])
            outputs.append(spikes)
        return torch.stack(outputs), states[1][-1]


def _entries(state: Any) -> list[Any]:
    return list(state) if isinstance(state, tuple) else [state]


def _snntorch() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    import snntorch

    yield "Leaky", lambda: _Steps(lambda: snntorch.Leaky(beta=0.9), "init_leaky")
    yield (
        "Leaky, learned",
        lambda: _Steps(lambda: snntorch.Leaky(beta=0.9, learn_beta=True, learn_threshold=True), "init_leaky"),
    )
    yield (
        "Synaptic",
        lambda: _Steps(lambda: snntorch.Synaptic(alpha=0.9, beta=0.8), "init_synaptic"),
    )
    yield "LeakyParallel", lambda: nn.Sequential(snntorch.LeakyParallel(8, 10, beta=0.9), nn.Linear(10, 4))


class _Reset(nn.Module):
    """A network of spikingjelly that forgets at the start of each call."""

    def __init__(self, neuron: Any, mode: str) -> None:
        super().__init__()
        from spikingjelly.activation_based import functional, layer

        self.layers = nn.Sequential(layer.Linear(8, 10), neuron(), layer.Linear(10, 4), neuron())
        self._mode = mode
        functional.set_step_mode(self, mode)

    def forward(self, x: Tensor) -> Any:
        from spikingjelly.activation_based import functional

        functional.reset_net(self)
        return self.layers(x) if self._mode == "m" else torch.stack([self.layers(step) for step in x])


def _spikingjelly() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    from spikingjelly.activation_based import neuron

    for name in ("IFNode", "LIFNode", "ParametricLIFNode", "EIFNode"):
        for mode in ("s", "m"):
            kind = getattr(neuron, name)
            yield f"{name} {mode}", lambda kind=kind, mode=mode: _Reset(kind, mode)  # type: ignore[misc]


class _Cells(nn.Module):
    """A network of norse, step by step."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        import norse.torch

        self.net = norse.torch.SequentialState(
            nn.Linear(8, 10), cell(), nn.Linear(10, 4), norse.torch.LICell()
        )

    def forward(self, x: Tensor) -> Any:
        state, outputs = None, []
        for step in x:
            output, state = self.net(step, state)
            outputs.append(output)
        return torch.stack(outputs)


def _norse() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    import norse.torch

    for name in ("LIFCell", "LIFAdExCell", "LSNNCell"):
        yield name, lambda name=name: _Cells(getattr(norse.torch, name))  # type: ignore[misc]
