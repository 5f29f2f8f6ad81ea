"""Calls as CUDA graphs, for all runtimes that enqueue work through PyTorch's streams."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from paretune.errors import TrialError

_WARMUPS = 3
"""What libraries do in their first calls can't be captured."""


class CapturedCall:
    """A call that is replayed as one CUDA graph, which costs no launches.

    Args:
        call: Enqueues work on the current stream of its device, always on the same tensors, and returns its output,
            which the next call overwrites. Kept: the graph reads and writes its tensors.
        device: The GPU.

    Raises:
        TrialError: The call waits for the GPU or computes on the CPU, or its graph computes something else. Timing one
            side of a pair as a graph and the other launch by launch would say nothing about the models.
    """

    output: Tensor

    def __init__(self, call: Callable[[], Tensor], device: torch.device) -> None:
        self._call = call
        # A stream of this very device: PyTorch's own for captures belongs to the device that captured first.
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # PyTorch doesn't annotate it
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(stream):
                    for _ in range(_WARMUPS):
                        call()
                    torch.cuda.synchronize()
                    expected = _without_waiting(call).clone()
                torch.cuda.synchronize()
                # Other threads of the process (data loading) may go on using CUDA meanwhile.
                with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                    self.output = call()
            except RuntimeError as error:
                raise _not_captured(str(error).strip().partition("\n")[0]) from error
            self.replay()
            torch.cuda.synchronize()
        largest = float(expected.abs().max())
        if not torch.allclose(self.output.float(), expected.float(), rtol=0.01, atol=0.01 * largest):
            raise _not_captured("its graph gives other outputs")

    def replay(self) -> None:
        """Enqueue the graph on the current stream."""
        self._graph.replay()


def _without_waiting(call: Callable[[], Tensor]) -> Tensor:
    """Call it; an operation that waits for the GPU raises here, where nothing is half captured yet."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _not_captured(reason: str) -> TrialError:
    return TrialError(
        f"a call must be replayable as a CUDA graph, but it isn't ({reason}); set target.options.cuda_graph to false"
    )
