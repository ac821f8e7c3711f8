"""Small models of the ``diffusers`` package with random weights; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_UNET: dict[str, Any] = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
}
_CODER: dict[str, Any] = {
    "block_out_channels": (16, 16),
    "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
_ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}


def models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """Yield names and builders of models with an example for each."""
    import diffusers

    options: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
        "UNet2DModel": (
            {
                **_UNET,
                "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            },
            lambda batch: {"sample": _random(batch, 3, 16, 16), "timestep": _times(batch)},
        ),
        "UNet2DConditionModel": (
            {
                **_UNET,
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "cross_attention_dim": 24,
                "attention_head_dim": 4,
            },
            lambda batch: {
                "sample": _random(batch, 4, 16, 16),
                "timestep": _times(batch),
                "encoder_hidden_states": _random(batch, 5, 24),
            },
        ),
        "AutoencoderKL": (_CODER, lambda batch: {"sample": _random(batch, 3, 16, 16)}),
        "VQModel": ({**_CODER, "num_vq_embeddings": 16}, lambda batch: {"sample": _random(batch, 3, 16, 16)}),
        "DiTTransformer2DModel": (
            {**_ATTENTION, "in_channels": 4, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10},
            lambda batch: {
                "hidden_states": _random(batch, 4, 8, 8),
                "timestep": _times(batch),
                "class_labels": torch.arange(batch),
            },
        ),
        "FluxTransformer2DModel": (
            {
                "patch_size": 1,
                "in_channels": 4,
                "num_layers": 1,
                "num_single_layers": 1,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 12,
                "pooled_projection_dim": 10,
                "axes_dims_rope": [4, 4, 8],
            },
            lambda batch: {
                "hidden_states": _random(batch, 16, 4),
                "encoder_hidden_states": _random(batch, 5, 12),
                "pooled_projections": _random(batch, 10),
                "timestep": _times(batch) / 9,
                "img_ids": torch.zeros(16, 3),
                "txt_ids": torch.zeros(5, 3),
            },
        ),
    }
    for name, (given, inputs) in options.items():

        def build(name: str = name, given: Any = given, inputs: Any = inputs) -> tuple[nn.Module, Any]:
            torch.manual_seed(0)
            return getattr(diffusers, name)(**given), lambda batch: ((), inputs(batch))

        yield f"diffusers {name}", build


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


def _times(batch: int) -> Tensor:
    return torch.arange(batch) * 7
