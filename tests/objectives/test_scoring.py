"""Accuracy of an artifact: every sample once, in order, also in a last batch that is smaller."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from paretune.objectives.compress.batchnorm import fold_batchnorm
from paretune.objectives.data import Splits
from paretune.objectives.runtimes import LoadOptions, get_runtime
from paretune.objectives.scoring import BATCH, artifact_outputs


@pytest.mark.parametrize("count", [1, 5, BATCH - 1, BATCH, BATCH + 1, 3 * BATCH + 7])
def test_outputs_come_in_the_order_of_the_split(
    trained: nn.Module, digit_splits: Splits, tmp_path: Path, count: int
) -> None:
    split = digit_splits.validation.head(count)
    assert isinstance(split.inputs, Tensor)
    runtime = get_runtime("openvino")
    module = fold_batchnorm(copy.deepcopy(trained), lambda model: model(split.inputs))
    runtime.deploy(module, digit_splits.validation.head(2).inputs, tmp_path / "model.onnx")
    calls: list[int] = []
    path, between = tmp_path / "model.onnx", lambda: calls.append(1)
    outputs, targets = artifact_outputs(runtime, path, LoadOptions(1), split, between=between)
    assert torch.equal(targets, split.targets)
    with torch.no_grad():
        torch.testing.assert_close(outputs, trained(split.inputs), atol=1e-3, rtol=1e-3)
    assert len(calls) == -(-count // BATCH)
