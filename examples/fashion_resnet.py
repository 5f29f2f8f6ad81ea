"""A ResNet-20 on Fashion-MNIST: the dense model of `fashion_resnet.yaml`.

Train it first (10 epochs): `python examples/fashion_resnet.py`
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from paretune.objectives.data import Inputs, load_splits, map_tensors
from paretune.objectives.finetune import Training, TrainOptions, fit
from paretune.objectives.tasks import Classification
from paretune.spaces.plan import Finetuning

WEIGHTS = Path(__file__).with_name("fashion_resnet.safetensors")


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


class ResNet20(nn.Module):
    """Inputs (N, 1, 28, 28), outputs logits (N, classes)."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(
            Block(channels_in, channels, stride), Block(channels, channels, 1), Block(channels, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def build(width: int = 16) -> nn.Module:
    """The factory that the job names."""
    return ResNet20(width)


def _flip(inputs: Inputs, generator: torch.Generator) -> Inputs:
    def flip(images: Tensor) -> Tensor:
        mirrored = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device) < 0.5
        return torch.where(mirrored, images.flip(-1), images)

    return map_tensors(flip, inputs)


def train(epochs: int = 10) -> None:
    """Train the dense model on the training split and save it; prints its accuracy on the validation split."""
    torch.manual_seed(0)
    splits = replace(load_splits("fashion-mnist"), augment=_flip)
    task, model = Classification(), build()
    training = Training(splits, task, TrainOptions(batch_size=128, weight_decay=5e-4))
    batches, steps = training.batches(seed=0), training.steps(1)
    for epoch in range(epochs):
        part = range(epoch * steps, (epoch + 1) * steps)
        fit(model, training, Finetuning(learning_rate=4e-3), batches, part, epochs * steps)
        with torch.no_grad():
            outputs = torch.cat([model(batch.inputs) for batch in splits.validation.batches(500)])
        print(
            f"epoch {epoch + 1}: validation accuracy {task.metric(outputs, splits.validation.targets):.4f}", flush=True
        )
    save_file(model.state_dict(), WEIGHTS)
    print(f"saved {WEIGHTS}")


if __name__ == "__main__":
    train()
