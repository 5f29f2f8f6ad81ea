"""The model and the data of job.yaml: replace both functions by yours.

`python project.py` trains the example model and saves `weights.safetensors`.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


def build(width: int = 32, classes: int = 10) -> nn.Module:
    """The model, untrained: paretune loads the weights that the job names."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, width),
        *block(width, 2 * width),
        nn.MaxPool2d(2),
        *block(2 * width, 4 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, classes),
    )


def data(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """The splits: train to learn, validation to compare trials, test for the final verification alone.

    Tensors, numpy arrays and map-style datasets of (inputs, target) do.
    """
    images, labels = load_digits(return_X_y=True)
    train, rest = train_test_split(range(len(labels)), test_size=0.4, stratify=labels, random_state=seed)
    validation, test = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=seed)
    inputs = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    targets = torch.tensor(labels, dtype=torch.int64)
    parts = {"train": train, "validation": validation, "test": test}
    return {name: (inputs[part], targets[part]) for name, part in parts.items()}


def train(path: Path, *, epochs: int = 10, batch_size: int = 64) -> float:
    """Train the model, save its weights, and return its accuracy on the validation split."""
    torch.manual_seed(0)
    splits = data()
    inputs, targets = splits["train"]
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        model.train()
        for part in torch.split(torch.randperm(len(inputs)), batch_size):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(model(inputs[part]), targets[part]))
            optimizer.step()
    model.eval()
    inputs, targets = splits["validation"]
    with torch.no_grad():
        accuracy = float((model(inputs).argmax(1) == targets).float().mean())
    save_file(model.state_dict(), path)
    return accuracy


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    weights = Path(__file__).with_name("weights.safetensors")
    logging.info("Validation accuracy %.4f; saved %s", train(weights), weights)
