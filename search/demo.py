"""The embedded default: a small convolutional net on scikit-learn's digits, trained here and searched at once."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from paretune.objectives.data import load_splits
from paretune.objectives.finetune import Training, TrainOptions, fit
from paretune.objectives.tasks import Classification
from paretune.search.job import Job, make_job
from paretune.spaces.plan import Finetuning

_EPOCHS = 30
_DATA = {"train": 0.4}
"""Few training samples: with more, the smallest nets of the space are as good as the largest."""


def build_model() -> nn.Module:
    """The dense model, untrained: inputs (N, 1, 8, 8) in [0, 1], outputs logits (N, 10)."""

    def block(channels_in: int, channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 64),
        *block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def demo_job(folder: Path, *, trials: int, report: Callable[[str], None]) -> Job:
    """Train the dense model and make the job that compresses it.

    Args:
        folder: Where the weights and the run go.
        trials: Budget of the search.
        report: Takes lines for the user.
    """
    names = ("demo" if i == 1 else f"demo-{i}" for i in count(1))
    free = (name for name in names if not any((folder / f"{name}{end}").exists() for end in ("", ".safetensors")))
    name = next(free)
    weights = folder / f"{name}.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    report("training a small convolutional net on scikit-learn's digits")
    torch.manual_seed(0)
    model = build_model()
    training = Training(load_splits("digits", _DATA), Classification(), TrainOptions(batch_size=64))
    steps = training.steps(_EPOCHS)
    fit(model, training, Finetuning(learning_rate=3e-3), training.batches(seed=0), range(steps), steps)
    save_file(model.state_dict(), weights)
    return make_job(
        {
            "name": name,
            "model": {"factory": f"{__name__}:build_model", "weights": str(weights)},
            "data": {"source": "digits", "args": _DATA},
            "space": {"channels": "fixed"},  # the probe would take a quarter of the demo's time
            "finetune": {"epochs": 3.0, "batch_size": 64},
            "target": {"batch_size": 64},
            "search": {"trials": trials, "workers": 2},
            "verify": {"points": 16},
            "results": str(folder),
        }
    )
