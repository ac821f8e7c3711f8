"""Small networks of the kinds that Dale's principle must hold in, each with an input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.around: nn.Module = nn.Identity()
        if stride > 1 or inputs != width:
            self.around = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(inner + self.around(x))


class ResNet(nn.Module):
    """Stem, three residual blocks of which one changes resolution and width, pooling, readout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.blocks = nn.Sequential(ResidualBlock(6, 6), ResidualBlock(6, 8, 2), ResidualBlock(8, 8))
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1)
        logits: Tensor = self.fc2(torch.relu(self.fc1(x)))
        return logits


class DenseNet(nn.Module):
    """A dense block with bottlenecks, normalisation ahead of each activation, and a transition."""

    def __init__(self, layers: int = 3, growth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        widths = [4 + growth * number for number in range(layers)]
        self.norms = nn.ModuleList([nn.BatchNorm2d(width) for width in widths])
        self.squeezes = nn.ModuleList([nn.Conv2d(width, 2 * growth, 1, bias=False) for width in widths])
        self.inner = nn.ModuleList([nn.BatchNorm2d(2 * growth) for _ in widths])
        self.convs = nn.ModuleList([nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False) for _ in widths])
        width = 4 + growth * layers
        self.norm, self.transition = nn.BatchNorm2d(width), nn.Conv2d(width, width // 2, 1)
        self.fc = nn.Linear(width // 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, squeeze, inner, conv in zip(self.norms, self.squeezes, self.inner, self.convs, strict=True):
            x = torch.cat([x, conv(torch.relu(inner(squeeze(torch.relu(norm(x))))))], 1)
        x = F.avg_pool2d(self.transition(torch.relu(self.norm(x))), 2)
        logits: Tensor = self.fc(torch.relu(x).mean((2, 3)))
        return logits


class Mobile(nn.Module):
    """Depthwise, grouped and shuffled convolutions, and a squeeze-and-excitation gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(16, 8, 1, groups=2)
        self.shuffle = nn.ChannelShuffle(2)
        self.point = nn.Conv2d(8, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.hidden, self.fc = nn.Linear(8 * 16, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        x = torch.relu(self.point(self.shuffle(torch.relu(self.grouped(x)))))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.max_pool2d(x * gate, 2)
        logits: Tensor = self.fc(torch.relu(self.hidden(x.flatten(1))))
        return logits


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a skip connection that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.join, self.leave = nn.Conv2d(12, 6, 3, padding=1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.relu(self.enter(x))
        coarse = torch.relu(self.middle(torch.relu(self.down(fine))))
        x = torch.cat([fine, torch.relu(self.up(coarse))], 1)
        logits: Tensor = self.leave(torch.relu(self.join(x)))
        return logits


class Recurrent(nn.Module):
    """A two-layer GRU between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 6)
        self.gru = nn.GRU(6, 5, num_layers=2, batch_first=True)
        self.hidden, self.leave = nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(torch.relu(self.enter(x)))
        logits: Tensor = self.leave(torch.relu(self.hidden(states[:, -1])))
        return logits


class Transformer(nn.Module):
    """An encoder layer between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.hidden, self.leave = nn.Linear(8, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(torch.relu(self.enter(x)))
        logits: Tensor = self.leave(torch.relu(self.hidden(x.mean(1))))
        return logits


def perceptron() -> nn.Module:
    return nn.Sequential(
        *(
            nn.Linear(4, 10),
            nn.ReLU(),
            nn.Linear(10, 8),
            nn.ReLU(),
            nn.Linear(8, 8),
            nn.ReLU(),
            nn.Linear(8, 3),
        )
    )


IMAGES, SEQUENCES = (3, 3, 8, 8), (3, 4, 4)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (perceptron, (5, 4)),
    "residual CNN": (ResNet, IMAGES),
    "dense block": (DenseNet, IMAGES),
    "grouped and depthwise": (Mobile, IMAGES),
    "transposed (U-Net)": (UNet, IMAGES),
    "GRU": (Recurrent, SEQUENCES),
    "transformer": (Transformer, SEQUENCES),
}
"""By name: what makes the network, and the shape of an input."""
