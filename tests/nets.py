"""Small networks that the tests share: each shows one thing that makes pruning or deploying hard."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.objectives.data.inputs import Inputs


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


def _conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution that keeps the size (but for its stride), and batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class VGG(nn.Module):
    """Twice two convolutions with batch norm and a pooling, then two linear layers (Simonyan and Zisserman, 2015,
    arXiv:1409.1556)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv_bn(3, 16), _conv_bn(16, 16)
        self.conv3, self.conv4 = _conv_bn(16, 32), _conv_bn(32, 32)
        self.hidden = nn.Linear(32 * 4, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        x = F.max_pool2d(F.relu(self.conv4(F.relu(self.conv3(x)))), 2)
        return self.head(F.relu(self.hidden(x.flatten(1))))


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv_bn(inputs, outputs, stride=stride), _conv_bn(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """Blocks with an identity shortcut and with a projection, all with batch norm (He et al., 2016,
    arXiv:1512.03385)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 16)
        self.blocks = nn.Sequential(_BasicBlock(16, 16, 1), _BasicBlock(16, 32, 2), _BasicBlock(32, 32, 1))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class _NormAct(nn.BatchNorm2d):
    """Batch norm with its activation inside, as timm writes it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, wide: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(inputs, wide, 1, bias=False), _NormAct(wide)
        self.depthwise = _conv_bn(wide, wide, 3, stride, groups=wide)
        self.project = _conv_bn(wide, outputs, 1)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(F.relu6(self.depthwise(self.norm(self.expand(x)))))
        return x + y if self.has_shortcut else y


class MobileNetV2(nn.Module):
    """Inverted residuals with linear bottlenecks (Sandler et al., 2018, arXiv:1801.04381)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 16)
        self.blocks = nn.Sequential(_InvertedResidual(16, 32, 16, 1), _InvertedResidual(16, 48, 24, 2))
        self.last = _conv_bn(24, 32, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu6(self.last(self.blocks(F.relu6(self.stem(x))))).mean((2, 3)))


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))


class _SameConv(nn.Conv2d):
    """Pads as TensorFlow does, in its own forward, as timm writes it; for a stride of 2 and even sizes."""

    def forward(self, x: Tensor) -> Tensor:
        least = self.kernel_size[0] - 2
        x = F.pad(x, (least // 2, least - least // 2) * 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class _MobileBlock(nn.Module):
    def __init__(self, inputs: int, wide: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.expand = _conv_bn(inputs, wide, 1)
        self.depthwise = _conv_bn(wide, wide, 5, stride, groups=wide)
        if stride == 2:
            self.depthwise[0] = _SameConv(wide, wide, 5, 2, groups=wide, bias=False)
        self.attend = _SqueezeExcite(wide, 16)
        self.project = _conv_bn(wide, outputs, 1)
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.attend(F.hardswish(self.depthwise(F.hardswish(self.expand(x))))))
        return x + y if self.has_shortcut else y


class MobileNetV3(nn.Module):
    """Inverted residuals with squeeze and excitation and hard swish (Howard et al., 2019, arXiv:1905.02244)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn(3, 16)
        self.blocks = nn.Sequential(_MobileBlock(16, 32, 16, 1), _MobileBlock(16, 48, 24, 2))
        self.hidden = nn.Linear(24, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.hardswish(self.stem(x))).mean((2, 3))
        return self.head(F.hardswish(self.hidden(x)))


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, bottleneck: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, bottleneck, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(bottleneck), nn.Conv2d(bottleneck, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return torch.cat([x, y], 1)


class DenseNet(nn.Module):
    """Concatenated features, batch norm before its convolution, and a transition (Huang et al., 2017,
    arXiv:1608.06993)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.first = nn.Sequential(_DenseLayer(16, 32, 16), _DenseLayer(32, 32, 16))
        self.norm, self.transition = nn.BatchNorm2d(48), nn.Conv2d(48, 24, 1, bias=False)
        self.second = _DenseLayer(24, 32, 16)
        self.last_norm = nn.BatchNorm2d(40)
        self.head = nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.transition(F.relu(self.norm(self.first(self.stem(x))))), 2)
        return self.head(F.relu(self.last_norm(self.second(x))).mean((2, 3)))


class UNet(nn.Module):
    """An encoder and a decoder of transposed convolutions, joined by concatenation (Ronneberger et al., 2015,
    arXiv:1505.04597); its prediction for each pixel is averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = _conv_bn(3, 16), _conv_bn(16, 32), _conv_bn(32, 48)
        self.up2, self.merge2 = nn.ConvTranspose2d(48, 32, 2, 2), _conv_bn(64, 32)
        self.up1, self.merge1 = nn.ConvTranspose2d(32, 16, 2, 2), _conv_bn(32, 16)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.down1(x))
        coarse = F.relu(self.down2(F.max_pool2d(fine, 2)))
        x = F.relu(self.middle(F.max_pool2d(coarse, 2)))
        x = F.relu(self.merge2(torch.cat([self.up2(x), coarse], 1)))
        x = F.relu(self.merge1(torch.cat([self.up1(x), fine], 1)))
        return self.head(x).mean((2, 3))


class _FusedAttention(nn.Module):
    """One layer for queries, keys and values, as timm writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))


class _EncoderBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _FusedAttention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """Patches, a class token and a position embedding before fused attention (Dosovitskiy et al., 2021,
    arXiv:2010.11929)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.position = nn.Parameter(torch.randn(1, 5, 32))
        self.blocks = nn.Sequential(_EncoderBlock(32, 4), _EncoderBlock(32, 4))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class _MaskedAttention(nn.Module):
    """A layer each for queries, keys and values, as Hugging Face's BERT writes it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_size = heads, width // heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.output, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.head_size).transpose(1, 2)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        query, key, value = self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        shares = (query @ key.transpose(2, 3) / self.head_size**0.5 + bias).softmax(3)
        mixed = (shares @ value).transpose(1, 2).flatten(2)
        return self.norm(x + self.output(mixed))


class BERT(nn.Module):
    """An encoder of tokens, norms last, whose first token is read (Devlin et al., 2019, arXiv:1810.04805); inputs by
    name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(20, 32), nn.Embedding(6, 32)
        self.register_buffer("positions", torch.arange(6))
        self.norm = nn.LayerNorm(32)
        self.attention = nn.ModuleList(_MaskedAttention(32, 4) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(32, 64) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(64, 32) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
        self.pool = nn.Linear(32, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens) + self.position(self.positions))
        bias = (1 - mask)[:, None, None, :] * -1e4
        for attention, up, down, norm in zip(self.attention, self.up, self.down, self.norms, strict=True):
            x = attention(x, bias)
            x = norm(x + down(F.gelu(up(x))))
        return self.head(self.pool(x[:, 0]).tanh())


class TiedLayers(nn.Module):
    """Two layers hold one weight; inputs (N, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 32)
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight = self.one.weight
        self.last = nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.two(F.relu(self.one(F.relu(self.first(x))))))
        return self.head(F.relu(self.last(x)))


class TiedEmbedding(nn.Module):
    """The embedding of the tokens is the head's weight, as in language models; a class is a token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.down(F.gelu(self.up(x)))
        return self.head((x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))


class Functional(nn.Module):
    """Everything between its layers is a function: chunk, split, concatenate, view, flatten with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.left, self.right = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 24, 1)
        self.gates = nn.Conv2d(40, 48, 1)
        self.last = nn.Conv2d(16, 16, 1)
        self.hidden = nn.Linear(16 * 4, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = F.relu(self.stem(x)).chunk(2, 1)
        x = torch.cat([F.relu(self.left(left)), F.relu(self.right(right))], 1)
        value, gate, shift = self.gates(x).split(16, 1)
        x = F.max_pool2d(F.relu(self.last(value * gate.sigmoid() + shift)), 4)
        return self.head(F.relu(self.hidden(x.view(x.size(0), -1))))


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


def signal(batch: int = 2) -> Tensor:
    """Inputs of `Signal`."""
    return torch.randn(batch, 2, 20, generator=torch.Generator().manual_seed(batch))


def gray(batch: int = 2) -> Tensor:
    """Inputs of `PlainCNN`."""
    return image(batch, 1)


def _woken(kind: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: wake_norms(kind())


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "PlainCNN": (_woken(PlainCNN), gray),
    "VGG": (_woken(VGG), image),
    "ResNet": (_woken(ResNet), image),
    "MobileNetV2": (_woken(MobileNetV2), image),
    "MobileNetV3": (_woken(MobileNetV3), image),
    "DenseNet": (_woken(DenseNet), image),
    "UNet": (_woken(UNet), image),
    "ViT": (ViT, image),
    "BERT": (BERT, tokens),
    "Transformer": (Transformer, sequence),
    "Signal": (Signal, signal),
    "MLP": (MLP, vector),
    "Recurrent": (Recurrent, sequence),
    "Grouped": (Grouped, image),
    "TiedLayers": (TiedLayers, vector),
    "TiedEmbedding": (TiedEmbedding, tokens),
    "Functional": (Functional, image),
}
"""Name to factory and inputs (of so many samples): what every technique is tried on. All give (N, classes)."""
