"""Accuracy of an artifact, in its own runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paretune.objectives.data.splits import Split
from paretune.objectives.runtimes import LoadOptions, Runtime
from paretune.objectives.runtimes.onnx_export import named_arrays

BATCH = 64
"""Samples per call when scoring: the batch size of the target may be 1, which would take many times longer."""


def artifact_outputs(
    runtime: Runtime,
    path: Path,
    options: LoadOptions,
    split: Split,
    *,
    between: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Outputs of a model file for every sample of a split, and the targets, in the split's order.

    Args:
        runtime: Runs the file.
        path: The model file.
        options: How to load it; batch size and purpose are replaced.
        split: Read once, in batches, so that a streamed one is never held whole.
        between: Called after each batch.
    """
    size = min(BATCH, len(split))
    session = runtime.load(path, replace(options, batch_size=size, purpose="score"))
    parts, targets = [], []
    for batch in split.batches(size):
        arrays = named_arrays(batch.inputs)
        count = len(batch.indices)
        if count < size:  # the last batch; the session's shape is fixed
            arrays = {name: np.resize(array, (size, *array.shape[1:])) for name, array in arrays.items()}
        parts.append(session.run(arrays)[:count])
        targets.append(batch.targets)
        between()
    return torch.from_numpy(np.concatenate(parts)), torch.cat(targets)
