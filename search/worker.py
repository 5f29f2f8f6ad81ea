"""The worker program: loads the job's problem, then runs requests until its pipe closes.

Started by `paretune.search.local` with the number of an inherited socket; not meant to be called by hand.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
import traceback
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import torch

from paretune.errors import ParetuneError
from paretune.objectives.accelerator import gpu_is_broken, share_gpu, training_device
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.progress import Stopped
from paretune.search.executor import Progress
from paretune.search.problem import load_evaluator


def main(descriptor: int) -> None:
    """Serve requests over the socket `descriptor`.

    Messages to the search: ``"ready"`` once, then for each request `Progress` any number of times and a triple (result,
    error, details). From the search: after its path and the job, pairs (number, request), and while one runs its number
    alone, which asks it to end early. One that comes too late is read before the next request, and means nothing.
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
            message = _receive(connection)
        except EOFError:
            return
        if isinstance(message, int):
            continue
        number, request = message
        outcome = _serve(evaluator, request, Wire(connection, number))
        connection.send(outcome)
        if outcome[1] and gpu_is_broken():
            return  # a new worker begins afresh


def _receive(connection: Connection[Any, Any]) -> Any:
    # From the process that started us, never from a file.
    return cloudpickle.loads(connection.recv_bytes())


class Wire:
    """Tells the search how a request goes, and hears whether it shall end: a `paretune.objectives.progress.Watcher`.

    Args:
        connection: To the search.
        number: Of the request that runs.
    """

    def __init__(self, connection: Connection[Any, Any], number: int) -> None:
        self._connection = connection
        self._number = number
        self._ends = False
        self._incoming = select.poll()  # registered once: Connection.poll makes a selector each time
        self._incoming.register(connection.fileno(), select.POLLIN)

    def got_on(self, so_far: Stopped) -> None:
        """Send it."""
        self._connection.send(Progress.of(self._number, so_far))

    def wants_end(self) -> bool:
        """Whether the search said so, or is no more; doesn't wait."""
        if not self._ends and self._incoming.poll(0):
            try:
                self._ends = _receive(self._connection) == self._number
            except (EOFError, OSError):
                self._ends = True
        return self._ends


def _serve(evaluator: Evaluator, request: Any, watcher: Wire) -> tuple[Any, str, str]:
    try:
        return request(evaluator, watcher), "", ""
    except ParetuneError as error:
        return None, str(error), traceback.format_exc()
    except Exception as error:
        return None, f"{type(error).__name__}: {error}", traceback.format_exc()


def _end_with_parent(parent: int) -> None:
    """A search that is killed with -9 can't end its workers, and one that trains doesn't read its pipe."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
