"""Models of ``torchvision`` with random weights and small inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_IMAGES = {
    **dict.fromkeys(("resnet18", "alexnet", "squeezenet1_0", "shufflenet_v2_x0_5", "mobilenet_v2"), 64),
    **dict.fromkeys(("mnasnet0_5", "mobilenet_v3_small", "efficientnet_b0", "regnet_x_400mf"), 64),
    **dict.fromkeys(("regnet_y_400mf", "convnext_tiny", "swin_t", "googlenet"), 64),
    **dict.fromkeys(("lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"), 64),
    "vit_b_16": 32,
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": {
        "min_size": 96,
        "max_size": 96,
        "box_detections_per_img": 4,
        **{f"rpn_{when}_nms_top_n_{mode}": 8 for when in ("pre", "post") for mode in ("train", "test")},
    },
    "vit_b_16": {"image_size": 32},
    "googlenet": {"init_weights": True},
}
_VIDEOS = ("r3d_18", "r2plus1d_18")
_DETECTORS = ("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large")


def models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """Yield names and builders of models with an example for each."""
    for name, size in _IMAGES.items():
        yield (
            f"torchvision {name}",
            lambda name=name, size=size: (_built(name), _tensors(3, size, size)),  # type: ignore[misc]
        )
    for name in _VIDEOS:
        yield f"torchvision {name}", lambda name=name: (_built(name), _tensors(3, 4, 32, 32))  # type: ignore[misc]
    for name in _DETECTORS:
        yield f"torchvision {name}", lambda name=name: (_built(name), _scenes)  # type: ignore[misc]
    yield "torchvision raft_small", lambda: (_built("raft_small"), _image_pairs)


def _built(name: str) -> nn.Module:
    import torchvision_operators

    torchvision_operators.declare()
    import torchvision

    torch.manual_seed(0)
    options = dict(_OPTIONS.get(name, {}))
    if name in (*_DETECTORS, "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"):
        options["weights_backbone"] = None
    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model


def _tensors(*shape: int) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    def example(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch)),), {}

    return example


def _image_pairs(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(batch)
    return tuple(torch.rand(batch, 3, 128, 128, generator=generator) for _ in range(2)), {
        "num_flow_updates": 2
    }


def _scenes(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return images and what is to be found in them: the box of something of the second class."""
    generator = torch.Generator().manual_seed(batch)
    images = [torch.rand(3, 96, 96, generator=generator) for _ in range(batch)]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]), "labels": torch.tensor([2])} for _ in images]
    return (images, targets), {}
