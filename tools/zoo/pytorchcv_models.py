"""Models of the ``pytorchcv`` package with random weights (``pip install --no-deps pytorchcv``)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_MODELS = {
    "resnet": "resnet10",
    "preresnet": "preresnet10",
    "resnext": "resnext14_16x4d",
    "seresnet": "seresnet10",
    "senet": "senet16",
    "densenet": "densenet121",
    "mobilenet": "mobilenet_wd4",
    "mobilenetv2": "mobilenetv2_wd4",
    "mobilenetv3": "mobilenetv3_small_w7d20",
    "shufflenet": "shufflenet_g1_wd4",
    "shufflenetv2": "shufflenetv2_wd2",
    "squeezenet": "squeezenet_v1_0",
    "efficientnet": "efficientnet_b0",
    "ghostnet": "ghostnet",
    "regnet": "regnetx002",
    "vgg": "vgg11",
    "bamresnet": "bam_resnet18",
    "cbamresnet": "cbam_resnet18",
    "igcv3": "igcv3_wd4",
    "mnasnet": "mnasnet_b1",
    "darknet": "darknet_tiny",
    "diracnetv2": "diracnet18v2",
    "menet": "menet108_8x1_g3",
    "sknet": "skresnet18",
    "fdmobilenet": "fdmobilenet_wd4",
    "xdensenet": "xdensenet121_2",
    "peleenet": "peleenet",
    "bninception": "bninception",
    "selecsls": "selecsls42",
    "hardnet": "hardnet39ds",
    "zfnet": "zfnet",
    "dla": "dla34",
    "res2net": "res2net50_w14_s8",
    "proxylessnas": "proxylessnas_cpu",
    "fbnet": "fbnet_cb",
    "ibnresnet": "ibn_resnet50",
    "rir_cifar": "rir_cifar10",
    "resnet_cifar": "resnet20_cifar10",
    "shakeshakeresnet_cifar": "shakeshakeresnet20_2x16d_cifar10",
    "wrn_cifar": "wrn16_10_cifar10",
}


def models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """Yield names and builders of models with an example for each."""
    for file, name in _MODELS.items():
        yield f"pytorchcv {name}", lambda file=file, name=name: _built(file, name)  # type: ignore[misc]


def _built(file: str, name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model: nn.Module = getattr(importlib.import_module(f"pytorchcv.models.{file}"), name)()
    size = 32 if "cifar" in name else 224

    def example(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch)),), {}

    return model, example
