"""Models of packages for neuroscience and for what is modelled with them, as far as they are installed.

Rate networks of nn4n, liquid networks of ncps, decoders of brain signals of braindecode, neural operators of
neuralop, and normalizing flows of zuko, which give a distribution: of them the log-density is compared.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn

Example = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
Build = Callable[[], tuple[nn.Module, Example]]

_DECODERS = (
    *("ATCNet", "AttentionBaseNet", "BDTCN", "BIOT", "ContraWR", "CTNet", "Deep4Net", "EEGConformer"),
    *("EEGInceptionERP", "EEGITNet", "EEGNet", "EEGNeX", "EEGSimpleConv", "EEGTCNet", "FBCNet", "IFNet"),
    *("MSVTNet", "SCCNet", "ShallowFBCSPNet", "SincShallowNet", "TIDNet"),
)
_FLOWS = ("MAF", "NSF", "NCSF", "NICE", "NAF", "UNAF", "SOSPF", "BPF", "GF", "GMM", "CNF")


def models() -> Iterator[tuple[str, Build]]:
    """Yield names and builders of models with an example for each."""
    packages = {
        "nn4n": _nn4n,
        "ncps": _ncps,
        "braindecode": _braindecode,
        "neuralop": _neuralop,
        "zuko": _zuko,
    }
    for package, found in packages.items():
        if importlib.util.find_spec(package) is not None:
            for name, make, example in found():
                yield f"{package} {name}", lambda make=make, example=example: (_seeded(make), example)  # type: ignore[misc]


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    numpy.random.seed(0)
    return make()


def _values(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _length(batch: int) -> int:
    """Return the time steps of a sequence, which are others for the third size."""
    return 7 if batch == 4 else 5


Found = Iterator[tuple[str, Callable[[], nn.Module], Example]]


def _nn4n() -> Found:
    from nn4n import model

    def steps(batch: int) -> Any:
        return (_values(_length(batch), batch, 3, seed=batch),), {}

    def rows(batch: int) -> Any:
        return (_values(batch, 3, seed=batch),), {}

    def rates(activation: str = "relu", **options: Any) -> Callable[[], nn.Module]:
        return lambda: model.CTRNN(dims=[3, 20, 2], activation=activation, **options)

    def signed() -> nn.Module:
        signs = torch.ones(20, 20)
        signs[16:] = -1
        masks: list[Any] = [None, signs, signs[:, :2]]
        sparse: list[Any] = [None, 1 - torch.eye(20), None]
        return rates(ei_masks=masks, sparsity_masks=sparse, biases="zero")()

    yield "CTRNN", rates(), steps
    yield "CTRNN, biases", rates(biases="uniform", activation="tanh"), steps
    yield "CTRNN, noise", rates(preact_noise=0.1, postact_noise=0.1, activation="sigmoid"), steps
    yield "CTRNN, learned start", rates(init_state="learn", weights="normal"), steps
    yield "CTRNN, signs and masks", signed, steps
    yield "MLP", lambda: model.MLP(dims=[3, 20, 20, 2]), rows


def _ncps() -> Found:
    from ncps import torch as liquid
    from ncps import wirings

    def steps(batch: int) -> Any:
        return (_values(batch, _length(batch), 6, seed=batch),), {}

    def timed(batch: int) -> Any:
        spans = _values(1, _length(batch), 1, seed=batch).abs()
        return (_values(batch, _length(batch), 6, seed=batch),), {"timespans": spans}

    def policy() -> Any:
        return wirings.AutoNCP(16, 4)

    yield "CfC", lambda: liquid.CfC(6, 16, proj_size=4), steps
    yield "CfC, pure", lambda: liquid.CfC(6, 16, mode="pure", backbone_layers=2, backbone_dropout=0.1), steps
    yield "CfC, no gate", lambda: liquid.CfC(6, 16, mode="no_gate", activation="relu"), steps
    yield "CfC, mixed memory", lambda: liquid.CfC(6, 16, mixed_memory=True, return_sequences=False), steps
    yield "CfC, wired", lambda: liquid.CfC(6, policy()), steps
    yield "LTC", lambda: liquid.LTC(6, 16), steps
    yield "LTC, wired", lambda: liquid.LTC(6, policy(), mixed_memory=True), steps
    yield "LTC, softplus", lambda: liquid.LTC(6, policy(), implicit_param_constraints=True), steps
    yield "LTC, time spans", lambda: liquid.LTC(6, wirings.FullyConnected(16, 4)), timed


def _braindecode() -> Found:
    from braindecode import models as decoders

    def signals(batch: int) -> Any:
        return (_values(batch, 20, 600, seed=batch),), {}

    def decoder(name: str) -> Callable[[], nn.Module]:
        options: dict[str, Any] = {"n_chans": 20, "n_outputs": 4, "n_times": 600, "sfreq": 100}
        return lambda: getattr(decoders, name)(**options)

    for name in _DECODERS:
        if hasattr(decoders, name):
            yield name, decoder(name), signals


def _neuralop() -> Found:
    from neuralop import models as operators

    def fields(batch: int) -> Any:
        return (_values(batch, 3, 20 if batch == 4 else 16, 16, seed=batch),), {}

    def options() -> dict[str, Any]:
        return {"in_channels": 3, "out_channels": 1, "hidden_channels": 8}

    yield "FNO", lambda: operators.FNO(n_modes=(4, 4), n_layers=2, **options()), fields
    yield (
        "FNO, norm",
        lambda: operators.FNO(
            n_modes=(4, 4), n_layers=2, norm="instance_norm", preactivation=True, **options()
        ),
        fields,
    )
    yield "TFNO", lambda: operators.TFNO(n_modes=(4, 4), n_layers=2, rank=0.5, **options()), fields
    yield (
        "UNO",
        lambda: operators.UNO(
            n_layers=3,
            channel_mlp_skip="linear",
            uno_out_channels=[8, 8, 8],
            uno_n_modes=[[4, 4]] * 3,
            uno_scalings=[[1.0, 1.0], [0.5, 0.5], [2.0, 2.0]],
            **options(),
        ),
        fields,
    )


class _LogDensity(nn.Module):
    """The log-density of values given a context, under a flow that gives a distribution."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor) -> Any:
        return self.flow(context).log_prob(x)


def _zuko() -> Found:
    from zuko import flows
    from zuko import nn as networks

    def pairs(batch: int) -> Any:
        return (_values(batch, 3, seed=batch), _values(batch, 4, seed=10 + batch)), {}

    def rows(batch: int) -> Any:
        return (_values(batch, 3, seed=batch),), {}

    def flow(name: str) -> Callable[[], nn.Module]:
        sizes: dict[str, Any] = {} if name == "GMM" else {"transforms": 2}
        if name == "CNF":
            sizes = {}
        return lambda: _LogDensity(getattr(flows, name)(3, 4, **sizes))

    def adjacency() -> Tensor:
        return _values(4, 3, seed=0) < 0.5

    for name in _FLOWS:
        yield name, flow(name), pairs
    yield "MaskedMLP", lambda: networks.MaskedMLP(adjacency(), [16, 16], residual=True), rows
    yield "MonotonicMLP", lambda: networks.MonotonicMLP(3, 4, [16, 16]), rows
