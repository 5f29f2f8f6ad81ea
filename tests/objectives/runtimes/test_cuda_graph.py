"""Calls as CUDA graphs; all of it needs a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paretune.errors import TrialError
from paretune.objectives.runtimes.cuda_graph import CapturedCall

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
]


def test_replaying_computes_anew() -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    x = torch.ones(4, device=device)
    captured = CapturedCall(lambda: x * 2, device)
    x.fill_(3.0)
    captured.replay()
    torch.cuda.synchronize(device)
    assert captured.output.tolist() == [6.0] * 4


def test_a_call_that_waits_is_refused_and_breaks_nothing() -> None:
    device = torch.device("cuda", 0)
    x = torch.ones(4, device=device)

    def waits() -> Tensor:
        return x * float(x.sum())

    with pytest.raises(TrialError, match="replayable as a CUDA graph"):
        CapturedCall(waits, device)
    assert torch.cuda.current_stream(device) == torch.cuda.default_stream(device)
    assert torch.cuda.get_sync_debug_mode() == 0
    assert bool(torch.isfinite(torch.nn.functional.dropout(x)).all()), "random numbers still come"
