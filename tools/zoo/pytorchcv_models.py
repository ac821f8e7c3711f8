"""Models of the ``pytorchcv`` package with random weights (``pip install --no-deps pytorchcv``).

One or two of each family that runs on images. A last pooling over a fixed window becomes one over whatever
there is, which is the same for the size the model was made for and lets small images through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_MODELS = (
    *("resnet10", "resneta10", "preresnet10", "resnext14_16x4d", "seresnet10", "sepreresnet10"),
    *("cbam_resnet18", "diaresnet10", "diapreresnet10", "octresnet10_ad2"),
    *("sharesnet18", "regnetx002", "regnety002", "densenet121", "condensenet74_c4_g4", "peleenet"),
    *("hardnet39ds", "vovnet27s", "selecsls42", "darknet_tiny", "alexnet", "bninception", "darts"),
    *("squeezenet_v1_0", "sqnxt23_w1", "shufflenet_g1_wd4", "shufflenetv2_wd2", "shufflenetv2b_wd2"),
    *("menet108_8x1_g3", "mobilenet_wd4", "mobilenetb_wd4", "fdmobilenet_wd4", "mobilenetv2_wd4"),
    *("mobilenetv2b_wd4", "mobilenetv3_small_w7d20", "igcv3_wd4", "mnasnet_b1", "proxylessnas_cpu"),
    *("fbnet_cb", "spnasnet", "efficientnet_b0", "efficientnet_b0b", "mixnet_s"),
    *("efficientnet_edge_small_b", "ghostnet", "dicenet_wd5", "espnetv2_wd2", "resnet20_cifar10"),
    *("preresnet20_cifar10", "seresnet20_cifar10", "densenet40_k12_cifar10"),
    *("xdensenet40_2_k24_bc_cifar10", "rir_cifar10", "nin_cifar10"),
    *("shakeshakeresnet20_2x16d_cifar10", "shakedropresnet20_cifar10", "resdropresnet20_cifar10"),
    *("diaresnet20_cifar10", "diapreresnet20_cifar10", "linknet_cityscapes", "unet_cityscapes"),
    *("erfnet_cityscapes", "enet_cityscapes", "edanet_cityscapes", "cgnet_cityscapes"),
    *("sinet_cityscapes", "simplepose_mobile_mobilenetv3_small_w1_coco", "channelnet", "revnet38"),
    *("ror3_56_cifar10", "msdnet22_cifar10", "bagnet9"),
)
_SIZES = {"alexnet": 224, "darknet_tiny": 224, "squeezenet_v1_0": 224}


def models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """Yield names and builders of models with an example for each."""
    for name in _MODELS:
        yield f"pytorchcv {name}", lambda name=name: _built(name)  # type: ignore[misc]


def _built(name: str) -> tuple[nn.Module, Any]:
    from pytorchcv.model_provider import get_model

    torch.manual_seed(0)
    options: dict[str, Any] = {"pretrained_backbone": False} if "simplepose" in name else {}
    model: nn.Module = get_model(name, pretrained=False, **options)
    if "cifar" in name:
        size = 32
    elif name.endswith("_cityscapes"):
        size = 128
        if hasattr(model, "fixed_size"):
            model.fixed_size = False  # type: ignore[assignment]
    else:
        size = _SIZES.get(name, 64)
        _pool_over_everything(model)
    channels = 1 if name == "superpointnet" else 3

    def example(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(batch)
        return (torch.randn(batch, channels, size, size, generator=generator),), {}

    return model, example


def _pool_over_everything(model: nn.Module) -> None:
    features = model._modules.get("features")
    pool = getattr(features, "final_pool", None)
    if isinstance(features, nn.Module) and isinstance(pool, nn.AvgPool2d):
        features.final_pool = nn.AdaptiveAvgPool2d(1)
