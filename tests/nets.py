"""Small networks that the tests share: each shows one thing that makes pruning or deploying hard."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainCNN(nn.Module):
    """Two blocks of convolution, batch norm, ReLU and pooling, then two linear layers; inputs (N, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc1 = nn.Linear(128, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


class Residual(nn.Module):
    """A stem, a block with an identity shortcut and one with a projection: three coupled groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.inner1 = nn.Conv2d(16, 16, 3, padding=1)
        self.outer1 = nn.Conv2d(16, 16, 3, padding=1)
        self.inner2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.outer2 = nn.Conv2d(32, 32, 3, padding=1)
        self.shortcut = nn.Conv2d(16, 32, 1, stride=2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.outer1(F.relu(self.inner1(x))) + x)
        x = F.relu(self.outer2(F.relu(self.inner2(x))) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted residual block of MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.project = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.depthwise(F.relu6(self.expand(x))))
        return self.head(F.relu(self.project(x)).mean((2, 3)))


class Dense(nn.Module):
    """Concatenated features, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.grow1 = nn.Conv2d(16, 24, 3, padding=1)
        self.grow2 = nn.Conv2d(40, 16, 3, padding=1)
        self.head = nn.Linear(56, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([x, F.relu(self.grow1(x))], 1)
        x = torch.cat([x, F.relu(self.grow2(x))], 1)
        return self.head(x.mean((2, 3)))


class Chunk(nn.Module):
    """A gate: one half of the channels multiplies the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.wide(F.relu(self.stem(x))).chunk(2, 1)
        return self.head((value * gate.sigmoid()).mean((2, 3)))


class SplitConcat(nn.Module):
    """Half of the channels pass a convolution, then both halves are joined, as in YOLO's C2f."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 32, 3, padding=1)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.wide(x).relu().chunk(2, 1)
        x = torch.cat([left, F.relu(self.middle(right))], 1)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Shuffle(nn.Module):
    """Shuffles channels between two groups, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.last = nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Heads(nn.Module):
    """Attention written by hand, whose heads are views of the channels; inputs (N, 5, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 32)
        self.query, self.key, self.value = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.project = nn.Linear(32, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        n, length, _ = x.shape
        query, key, value = (layer(x).view(n, length, 4, -1).transpose(1, 2) for layer in self._projections())
        mixed = (query @ key.transpose(2, 3)).softmax(3) @ value
        return self.head(F.relu(self.project(mixed.transpose(1, 2).reshape(n, length, -1))).mean(1))

    def _projections(self) -> tuple[nn.Module, ...]:
        return self.query, self.key, self.value


class Attentive(nn.Module):
    """Weights positions by their mean over channels, and channels by a squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.squeeze = nn.Conv2d(32, 16, 1)
        self.excite = nn.Conv2d(16, 32, 1)
        self.last = nn.Conv2d(32, 16, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = x * torch.sigmoid(x.mean(1, keepdim=True))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class GroupNormed(nn.Module):
    """Normalises in groups of channels: which channels are neighbours matters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.norm = nn.GroupNorm(4, 32)
        self.last = nn.Conv2d(32, 16, 3)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.relu(self.norm(self.first(x))))).mean((2, 3)))


class FixedView(nn.Module):
    """Writes its channel count down a second time, in a `view`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(x.view(len(x), 32, -1).mean(2))


class Grouped(nn.Module):
    """A convolution in four groups, as in ResNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.last = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.first(x))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class MLP(nn.Module):
    """Three linear layers, one too narrow to cut; inputs (N, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 32)
        self.narrow = nn.Linear(32, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.narrow(F.relu(self.first(x)))))


class Signal(nn.Module):
    """A 1-D convolutional net; inputs (N, 2, 20)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(2, 16, 5, padding=2)
        self.conv2 = nn.Conv1d(16, 24, 3, stride=2, padding=1)
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.conv2(F.relu(self.conv1(x)))).mean(2))


class TwoInputs(nn.Module):
    """An image and numbers, given in order; their features are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, padding=1)
        self.table = nn.Linear(6, 16)
        self.head = nn.Linear(32, 3)

    def forward(self, image: Tensor, numbers: Tensor) -> Tensor:
        seen = F.relu(self.conv(image)).mean((2, 3))
        return self.head(torch.cat([seen, F.relu(self.table(numbers))], 1))


class TokenEncoder(nn.Module):
    """An embedding, a feed-forward block with layer norm and a shortcut; inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(F.relu(self.up(self.norm(x))))
        return self.head((x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


class Unused(nn.Module):
    """Has a layer that forward never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(12, 16)
        self.auxiliary = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.body(x)))


class Transformer(nn.Module):
    """An encoder layer of PyTorch between two linear layers; inputs (N, 5, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.project(x)).mean(1))


class Attention(nn.Module):
    """Multi-head attention alone; inputs (N, 5, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    """An LSTM with two linear layers; inputs (N, 5, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.hidden = nn.Linear(16, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(self.project(x))
        return self.head(F.relu(self.hidden(x[:, -1])))


class Twice(nn.Module):
    """Calls one layer twice; inputs (N, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.again = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.again(F.relu(self.again(F.relu(self.first(x)))))))


class FixedBatch(nn.Module):
    """Only runs on batches of two, because its forward says so; inputs (N, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.first(x)).view(2, 4, 4).transpose(1, 2).reshape(2, 16))


class Fold(nn.Module):
    """Batch norms that can be folded, and such that can't; inputs (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)  # folded
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.bn_shared = nn.BatchNorm2d(8)  # the convolution's output is read by an addition too
        self.twice = nn.Conv2d(8, 8, 1)
        self.bn_twice = nn.BatchNorm2d(8)  # the convolution is called twice
        self.bn_input = nn.BatchNorm2d(8)  # stands after an activation
        self.fc = nn.Linear(8, 12)
        self.bn_fc = nn.BatchNorm1d(12)  # folded
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn_input(F.relu(self.bn(self.conv(x))))
        x = self.shared(x)
        x = F.relu(self.bn_shared(x) + x)
        x = F.relu(self.bn_twice(self.twice(self.twice(x))))
        return self.head(F.relu(self.bn_fc(self.fc(x.mean((2, 3))))))


def image(batch: int = 2, channels: int = 3, size: int = 8) -> Tensor:
    """A batch of random images, always the same ones."""
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(batch))


def vector(batch: int = 2, length: int = 12) -> Tensor:
    """A batch of random vectors, always the same ones."""
    return torch.randn(batch, length, generator=torch.Generator().manual_seed(batch))


def sequence(batch: int = 2) -> Tensor:
    """A batch of random sequences of 5 steps with 8 features, always the same ones."""
    return torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(batch))


def tokens(batch: int = 2) -> dict[str, Tensor]:
    """Inputs of `TokenEncoder`."""
    generator = torch.Generator().manual_seed(batch)
    mask = (torch.arange(6) < torch.randint(3, 7, (batch, 1), generator=generator)).float()
    return {"tokens": torch.randint(20, (batch, 6), generator=generator), "mask": mask}


def image_and_numbers(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Inputs of `TwoInputs`."""
    return image(batch, 1), vector(batch, 6)


def wake_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch norms the statistics and scales of a trained model; fresh ones change nothing in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            size = module.num_features
            module.running_mean = torch.randn(size, generator=generator) * 0.1
            module.running_var = torch.rand(size, generator=generator) + 0.5
            module.weight.data = torch.rand(size, generator=generator) + 0.5
            module.bias.data = torch.randn(size, generator=generator) * 0.1
    return model
