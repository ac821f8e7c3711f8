"""Models of ``timm`` with random weights: a small one of each family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_MODELS: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": {"img_size": 32, "depth": 2},
    "halonet26t": {"input": 256},
    "lambda_resnet26t": {"input": 128},
    "test_byobnet": {},
    "cait_xxs24_224": {"img_size": 64, "depth": 2},
    "coat_tiny": {"img_size": 64},
    "convit_tiny": {"img_size": 64, "depth": 4},
    "convmixer_1024_20_ks9_p14": {},
    "test_convnext": {},
    "crossvit_tiny_240": {"input": 240},
    "cs3darknet_s": {},
    "davit_tiny": {},
    "deit_tiny_patch16_224": {"img_size": 64, "depth": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 2},
    "dla34": {},
    "dpn68": {},
    "edgenext_xx_small": {},
    "efficientformer_l1": {"input": 224},
    "efficientformerv2_s0": {"img_size": 64},
    "test_efficientnet": {},
    "efficientvit_b0": {},
    "efficientvit_m0": {"input": 224},
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 2},
    "fasternet_t0": {},
    "fastvit_t8": {},
    "focalnet_tiny_srf": {},
    "gcvit_xxtiny": {"input": 224},
    "ghostnet_100": {},
    "ghostnetv2_100": {},
    "hardcorenas_a": {},
    "hgnetv2_b0": {},
    "hiera_tiny_224": {"input": 224},
    "hrnet_w18_small": {},
    "inception_next_atto": {},
    "inception_v3": {"input": 128},
    "levit_128s": {"input": 224},
    "mambaout_femto": {},
    "test_maxvit": {"input": 160},
    "caformer_s18": {},
    "poolformer_s12": {},
    "mixer_s32_224": {"img_size": 64},
    "gmlp_s16_224": {"img_size": 64},
    "resmlp_12_224": {"img_size": 64},
    "lcnet_050": {},
    "mobilenetv3_small_050": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "mvitv2_tiny": {"img_size": 64},
    "nest_tiny": {"img_size": 112},
    "nextvit_small": {},
    "test_nfnet": {},
    "pit_ti_224": {"input": 224},
    "pvt_v2_b0": {},
    "rdnet_tiny": {},
    "regnety_002": {},
    "repghostnet_050": {},
    "repvit_m0_9": {},
    "res2net50_26w_4s": {},
    "resnest14d": {},
    "test_resnet": {},
    "resnetv2_18": {},
    "rexnet_100": {},
    "selecsls42": {},
    "legacy_seresnet18": {},
    "sequencer2d_s": {"img_size": 64},
    "skresnet18": {},
    "starnet_s050": {},
    "swiftformer_xs": {},
    "swin_tiny_patch4_window7_224": {"img_size": 56},
    "swinv2_tiny_window8_256": {"img_size": 64},
    "swinv2_cr_tiny_224": {"img_size": 64},
    "tiny_vit_5m_224": {"input": 224},
    "tnt_s_legacy_patch16_224": {"input": 224, "depth": 2},
    "tresnet_m": {},
    "twins_pcpvt_small": {"img_size": 64},
    "visformer_tiny": {"img_size": 64},
    "test_vit": {"img_size": 64},
    "vit_tiny_r_s16_p8_224": {"img_size": 64, "depth": 2},
    "test_vit_relpos": {"img_size": 64},
    "volo_d1_224": {"img_size": 64},
    "ese_vovnet19b_slim": {},
    "xception41": {},
    "xcit_nano_12_p8_224": {"img_size": 64, "depth": 2},
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
