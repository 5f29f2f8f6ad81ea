"""The nets of the benchmarks: plain PyTorch, seeded, for 32 x 32 images in colour.

Their weights are random, which changes no latency; but their batch norms have seen data and their outputs are centred.
Fresh batch norms change nothing, which runtimes optimize away, and an uncentred random net predicts one class for all
inputs, with which every artifact would agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
SHAPE = (3, 32, 32)


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al., 2016, arXiv:1512.03385)."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet without the pooling at its entrance, as for CIFAR.

    Args:
        widths: Channels of each stage; from the second on, a stage begins with a stride of 2.
        depth: Blocks a stage.
    """

    def __init__(self, widths: Sequence[int], depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(SHAPE[0], widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        blocks: list[nn.Module] = []
        channels = widths[0]
        for stage, width in enumerate(widths):
            for block in range(depth):
                blocks.append(Block(channels, width, 2 if stage and not block else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Attention(nn.Module):
    """Self-attention (Vaswani et al., 2017, arXiv:1706.03762); inputs and outputs (N, tokens, width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens, width = x.shape[1], x.shape[2]
        # -1 for the batch, which an artifact must leave free.
        q, k, v = self.qkv(x).reshape(-1, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.project(y.transpose(1, 2).reshape(-1, tokens, width))
        return mixed


class Layer(nn.Module):
    """One layer of a transformer, norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        grown: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + grown


class ViT(nn.Module):
    """A small vision transformer (Dosovitskiy et al., 2021, arXiv:2010.11929) on 64 patches, mean over tokens."""

    def __init__(self, width: int = 192, heads: int = 3, depth: int = 6) -> None:
        super().__init__()
        self.patches = nn.Conv2d(SHAPE[0], width, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.layers(x)).mean(1))
        return logits


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: ResNet((64, 128, 256, 512), depth=2),
    "resnet20": lambda: ResNet((16, 32, 64), depth=3),
    "vit": ViT,
}
"""Name to factory, untouched by data."""


def images(count: int, seed: int) -> Tensor:
    """Noise, shape (count, 3, 32, 32)."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


def build(name: str) -> nn.Module:
    """A net of that name, the same at every call, in eval mode."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = NETS[name]()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0  # the statistics of the one batch that it sees
                module.weight.copy_(torch.rand_like(module.weight) + 0.5)
                module.bias.copy_(torch.randn_like(module.bias) * 0.1)
        samples = images(64, seed=1)
        model.train()(samples)
        model.eval()
        head = model.get_submodule("head")
        assert isinstance(head, nn.Linear)
        head.bias.sub_(model(samples).mean(0))
    return model
