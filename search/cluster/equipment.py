"""What a trainer needs to evaluate plans on any node of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import ray
import torch

from paretune.objectives.accelerator import share_gpu, training_device
from paretune.objectives.baseline import Baseline
from paretune.objectives.device import Device, is_here
from paretune.objectives.evaluate import Evaluator
from paretune.search.cluster.bench import RemoteBench
from paretune.search.cluster.gauge import add_path, own_path
from paretune.search.cluster.gauges import Gauges
from paretune.search.cluster.parcels import Parcel, pack
from paretune.search.cluster.scratch import scratch
from paretune.search.job import Job
from paretune.search.problem import BASELINE, load_problem


@dataclass(frozen=True)
class Equipment:
    """Goes to each trainer, picklable: the job, its run's baseline, and where to measure. Made by `Equipment.of`.

    Attributes:
        job: Pickled by cloudpickle; what it holds may be importable only once the path is set.
        path: Folders of the driver's ``sys.path``.
        gauges: Of the run.
    """

    job: bytes
    path: tuple[str, ...]
    gauges: Gauges

    @classmethod
    def of(cls, job: Job, run: Path, gauges: Gauges) -> Equipment:
        """For the trials of a run whose folder holds the measured baseline."""
        return cls(cloudpickle.dumps(job), own_path(), gauges.of_run(run))

    def open(self, waiting: Callable[[], AbstractContextManager[None]] = nullcontext) -> Evaluator:
        """Load everything, once for each trainer; it trains with the threads and the share of a GPU that it takes.

        Args:
            waiting: Gives a block in which a trial waits for a gauge.

        Raises:
            JobError: What the job names isn't on this machine.
        """
        add_path(self.path)
        job: Job = cloudpickle.loads(self.job)  # from the driver, never from a file
        takes = job.ray.resources
        torch.set_num_threads(max(1, int(takes.cpu)))
        sharing = max(1, round(1 / takes.gpu)) if takes.gpu else job.search.workers
        share_gpu(training_device(job.finetune.device), sharing)
        run = scratch("trainer") / "run"  # unpacking replaces a folder, and with it the lock that keeps it
        files: Parcel = ray.get(self.gauges.files[0])
        files.unpack(run)
        with Device(*filter(is_here, job.devices)).shared():
            problem = load_problem(job, self.gauges.capabilities)
        return Evaluator(problem, Baseline(run / BASELINE), RemoteBench(problem, self.gauges, waiting))

    def carry_out(self, folder: Path) -> Parcel:
        """Pack a folder for another machine."""
        return pack(folder, self.gauges.storage)

    def carry_in(self, parcel: Parcel, folder: Path) -> None:
        """Unpack a folder that came from another machine, in place of what is there; the parcel is used up."""
        parcel.unpack(folder)
        parcel.discard()
