"""The worker program: loads the job's problem, then runs requests until its pipe closes.

Started by `paretune.search.local` with the number of an inherited socket; not meant to be called by hand.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import torch

from paretune.errors import ParetuneError
from paretune.objectives.accelerator import share_gpu, training_device
from paretune.objectives.evaluate import Evaluator
from paretune.search.problem import load_evaluator


def main(descriptor: int) -> None:
    """Serve requests over the socket `descriptor`.

    Messages to the search: ``"ready"`` once, then for each request a triple (result, error, details).
    """
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    connection: Connection[Any, Any] = Connection(descriptor)
    sys.path[:] = _receive(connection)
    job, run = _receive(connection)
    share_gpu(training_device(job.finetune.device), job.search.workers)
    evaluator = load_evaluator(job, run)
    connection.send("ready")
    while True:
        try:
            request = _receive(connection)
        except EOFError:
            return
        outcome = _serve(evaluator, request)
        connection.send(outcome)
        if outcome[1] and _gpu_is_broken():
            return  # a new worker begins afresh


def _receive(connection: Connection[Any, Any]) -> Any:
    # From the process that started us, never from a file.
    return cloudpickle.loads(connection.recv_bytes())


def _serve(evaluator: Evaluator, request: Any) -> tuple[Any, str, str]:
    try:
        return request(evaluator), "", ""
    except ParetuneError as error:
        return None, str(error), traceback.format_exc()
    except Exception as error:
        return None, f"{type(error).__name__}: {error}", traceback.format_exc()


def _gpu_is_broken() -> bool:
    """Whether a failure left CUDA unusable in this process, as an illegal access or a broken capture does."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # PyTorch doesn't annotate it
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return bool(torch.cuda.current_stream() != torch.cuda.default_stream())


def _end_with_parent(parent: int) -> None:
    """A search that is killed with -9 can't end its workers, and one that trains doesn't read its pipe."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
