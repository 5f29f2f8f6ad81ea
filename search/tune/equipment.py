"""What a trainable is given besides its requests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from paretune.objectives.evaluate import Evaluator
from paretune.search.cluster.parcels import Parcel

Waiting = Callable[[], AbstractContextManager[None]]


class Equipment(Protocol):
    """Loads what trials need, and carries folders between their workers and the driver; must be picklable.

    `paretune.search.cluster.equipment.Equipment` is that of a job.
    """

    def open(self, waiting: Waiting) -> Evaluator:
        """Load it; called once in each worker.

        Args:
            waiting: Gives a block in which a trial waits for others, which isn't counted towards its deadline.
        """

    def carry_out(self, folder: Path) -> Parcel:
        """Pack a folder for another machine."""

    def carry_in(self, parcel: Parcel, folder: Path) -> None:
        """Unpack a folder from another machine in place of what is there, as a whole; the parcel is used up."""
