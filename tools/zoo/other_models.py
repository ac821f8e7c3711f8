"""Models of smaller packages: graph networks, einops layers, networks for segmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_GRAPH_NETWORKS = ("GCN", "GraphSAGE", "GIN", "GAT", "PNA", "EdgeCNN")
_SEGMENTATION = ("Unet", "Linknet", "FPN", "PSPNet", "DeepLabV3Plus", "MAnet")


def models() -> Iterator[tuple[str, Callable[[], tuple[nn.Module, Any]]]]:
    """Yield names and builders of models with an example for each."""
    for name in _GRAPH_NETWORKS:
        yield f"torch_geometric {name}", lambda name=name: _graph_network(name)  # type: ignore[misc]
    for name in _SEGMENTATION:
        yield f"segmentation {name}", lambda name=name: _segmentation(name)  # type: ignore[misc]
    yield "einops layers", lambda: (_EinopsMixer(), _images)
    yield "einops attention", lambda: (_EinopsAttention(), _images)


def _graph_network(name: str) -> tuple[nn.Module, Any]:
    from torch_geometric.nn import models as networks

    torch.manual_seed(0)
    options: dict[str, Any] = {"norm": "batch_norm", "dropout": 0.2}
    if name == "PNA":
        degrees = torch.tensor([0, 2, 4, 2])
        options |= {"aggregators": ["mean", "max"], "scalers": ["identity"], "deg": degrees}
    model: nn.Module = getattr(networks, name)(8, 16, 2, out_channels=4, **options)

    def example(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        generator = torch.Generator().manual_seed(batch)
        nodes = 6 * batch
        edges = torch.randint(0, nodes, (2, 3 * nodes), generator=generator)
        return (torch.randn(nodes, 8, generator=generator), edges), {}

    return model, example


def _segmentation(name: str) -> tuple[nn.Module, Any]:
    import torchvision_operators

    torchvision_operators.declare()
    import segmentation_models_pytorch

    torch.manual_seed(0)
    model: nn.Module = getattr(segmentation_models_pytorch, name)("resnet18", encoder_weights=None)
    return model, _images


def _images(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch)),), {}


class _EinopsMixer(nn.Module):
    """Mixes patches, then channels, with the layers of einops."""

    def __init__(self) -> None:
        super().__init__()
        from einops.layers.torch import EinMix, Rearrange, Reduce

        self.patches = Rearrange("b c (h p) (w q) -> b (h w) (p q c)", p=16, q=16)
        self.embed = nn.Linear(768, 32)
        self.tokens = EinMix("b t c -> b u c", weight_shape="t u", bias_shape="u", t=16, u=16)
        self.channels = nn.Linear(32, 32)
        self.pool = Reduce("b t c -> b c", "mean")

    def forward(self, x: Tensor) -> Any:
        hidden = self.embed(self.patches(x))
        hidden = hidden + torch.nn.functional.gelu(self.tokens(hidden))
        return self.pool(self.channels(hidden))


class _EinopsAttention(nn.Module):
    """Attends over patches, with the functions of einops."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(768, 32)
        self.qkv = nn.Linear(32, 96, bias=False)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Any:
        from einops import rearrange, repeat

        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=16, q=16)
        hidden = self.embed(patches)
        query, key, value = rearrange(self.qkv(hidden), "b t (three h d) -> three b h t d", three=3, h=4)
        batch, _, _ = hidden.shape
        scale = repeat(torch.ones(1), "one -> b one one2 one3", b=batch, one2=1, one3=1)
        weights = (query @ key.transpose(-2, -1) * scale).softmax(-1)
        return self.out(rearrange(weights @ value, "b h t d -> b t (h d)"))
