"""The models people train on GPUs, at the sizes of their papers, or small enough to be tried anywhere.

ResNet-50: He, Zhang, Ren, Sun, CVPR 2016. ViT-B/16: Dosovitskiy et al., ICLR 2021. GPT-2 small: Radford et
al., 2019.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """Three convolutions, the second at a quarter of the width, and a way around them."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        inner = width // 4
        self.conv1, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.around: nn.Module = nn.Identity()
        if stride > 1 or channels != width:
            conv = nn.Conv2d(channels, width, 1, stride, bias=False)
            self.around = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both ways, ``(batch, width, height, width)``."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.around(x))


def resnet50(width: int = 64, depths: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> nn.Module:
    """Return a residual network of bottlenecks, for ``(batch, 3, height, width)``."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)]
    layers += [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    channels = width
    for place, depth in enumerate(depths):
        out = 4 * width << place
        for number in range(depth):
            layers.append(Bottleneck(channels, out, 2 if place and not number else 1))
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Attention(nn.Module):
    """A block of a transformer with its norms in front, for ``(batch, sequence, width)``."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return as many tokens as came in."""
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        found: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return found


class VisionTransformer(nn.Module):
    """Patches as tokens, with a class token in front, for ``(batch, 3, size, size)``."""

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Attention(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, classes)``."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], 1) + self.places
        found: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return found


class LanguageModel(nn.Module):
    """Says which token comes next, for ``(batch, sequence)`` of token numbers."""

    def __init__(self, tokens: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Attention(width, heads, causal=True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, tokens, sequence)``: the kinds are the second axis, as a loss takes them."""
        places = torch.arange(x.shape[1], device=x.device)
        found: Tensor = self.head(self.norm(self.blocks(self.tokens(x) + self.places(places))))
        return found.transpose(1, 2)


@dataclass(frozen=True)
class LargeModel:
    """A model, and a batch for it."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Tensor


def large_models(*, tiny: bool) -> Iterator[LargeModel]:
    """Yield the models one by one: at their real sizes, or tiny."""
    own = torch.Generator().manual_seed(0)
    if tiny:
        images, words = torch.randn(2, 3, 32, 32, generator=own), torch.randint(50, (2, 16), generator=own)
        yield LargeModel("ResNet-50, tiny", lambda: resnet50(8, (1, 1, 1, 1), 10), images)
        yield LargeModel("ViT-B/16, tiny", lambda: VisionTransformer(32, 16, 32, 2, 4, 10), images)
        yield LargeModel("GPT-2 small, tiny", lambda: LanguageModel(50, 16, 32, 2, 4), words)
        return
    images = torch.randn(64, 3, 224, 224, generator=own)
    words = torch.randint(50257, (8, 1024), generator=own)
    yield LargeModel("ResNet-50", resnet50, images)
    yield LargeModel("ViT-B/16", lambda: VisionTransformer(224, 16, 768, 12, 12, 1000), images)
    yield LargeModel("GPT-2 small", lambda: LanguageModel(50257, 1024, 768, 12, 12), words)
