"""Models of ``timm`` with random weights: a small one of each family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_NARROW = {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 4}
_MODELS: dict[str, dict[str, Any]] = {
    "test_byobnet": {},
    "cait_xxs24_224": {"img_size": 64, "depth": 2},
    "convit_tiny": {"img_size": 64, "depth": 4},
    "test_convnext": {},
    "cs3darknet_s": {},
    "deit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "edgenext_xx_small": {},
    "efficientformerv2_s0": {"img_size": 64},
    "test_efficientnet": {},
    "efficientvit_b0": {},
    "efficientvit_m0": {"input": 224},
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 2},
    "fasternet_t0": {},
    "fastvit_t8": {},
    "ghostnet_100": {},
    "ghostnetv2_100": {},
    "hgnetv2_b0": {},
    "inception_next_atto": {},
    "levit_128s": {"input": 224},
    "mambaout_femto": {},
    "test_maxvit": {"input": 160},
    "poolformer_s12": {},
    "mixer_s32_224": {"img_size": 64},
    "gmlp_s16_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "lcnet_050": {},
    "mobilenetv3_small_050": {},
    "mobilevit_xxs": {},
    "test_nfnet": {},
    "pit_ti_224": {"input": 224},
    "pvt_v2_b0": {},
    "regnety_002": {},
    "repghostnet_050": {},
    "repvit_m0_9": {},
    "resnest14d": {},
    "test_resnet": {},
    "resnetv2_18": {},
    "rexnet_100": {},
    "skresnet18": {},
    "starnet_s050": {},
    "swiftformer_xs": {},
    "swin_tiny_patch4_window7_224": {"img_size": 56},
    "swinv2_tiny_window8_256": {"img_size": 64},
    "twins_pcpvt_small": {"img_size": 64},
    "visformer_tiny": {"img_size": 64},
    "test_vit": {"img_size": 64},
    "vit_tiny_r_s16_p8_224": {"img_size": 64, "depth": 2},
    "test_vit_relpos": {"img_size": 64},
    "ese_vovnet19b_slim": {},
    "xcit_nano_12_p8_224": {"img_size": 64, "depth": 2},
    "beit_base_patch16_224": _NARROW,
    "coat_lite_mini": {"img_size": 64},
    "samvit_base_patch16_224": _NARROW,
    "shvit_s1": {},
    "tnt_s_patch16_224": {"img_size": 64, "depth": 2},
}


def models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """Yield names and builders of models with an example for each."""
    for name, options in _MODELS.items():
        yield f"timm {name}", lambda name=name, options=options: _built(name, options)  # type: ignore[misc]


def _built(name: str, options: dict[str, Any]) -> tuple[nn.Module, Any]:
    import torchvision_operators

    torchvision_operators.declare()
    import timm

    torch.manual_seed(0)
    options = {"drop_rate": 0.1, **options}
    size = options.pop("input", options.get("img_size", 64))
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=10, **options)

    def example(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch)),), {}

    return model, example
