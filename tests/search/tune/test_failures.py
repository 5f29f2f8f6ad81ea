"""What is told of a death: one line that is worth reading."""

from __future__ import annotations

import pickle
from contextlib import nullcontext

import pytest
from ray.air.execution import FixedResourceManager, ResourceRequest
from ray.air.execution._internal import RayActorManager
from ray.air.execution._internal.tracked_actor_task import TrackedActorTask
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayActorError, RayTaskError

from paretune.search.tune.failures import (
    Blame,
    TrialBrokeOffError,
    WorkerBusyError,
    WorkerUnreadyError,
    survive_deaths,
    understand,
)

pytestmark = pytest.mark.ray

PROCESS = """The actor died unexpectedly before finishing this task.
\tclass_name: PlanTrainable
\tactor_id: 01
\tpid: 4
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) ..."""
NODE = "The actor died because its node has died. Node Id: 01"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        pytest.param(
            RayActorError(error_msg=PROCESS), "unexpectedly exits with a connection error code 2", id="process"
        ),
        pytest.param(RayActorError(error_msg=NODE), "its node is gone", id="node"),
        pytest.param(
            OutOfMemoryError("killed as the node was low on memory"), "its machine ran out of memory", id="memory"
        ),
        pytest.param(ActorDiedError(), "before finishing this task", id="unknown"),
    ],
)
def test_a_death_is_told_in_a_line(error: Exception, told: str) -> None:
    failure = understand(error)
    assert failure.blame is Blame.DEATH
    assert failure.error.startswith("the worker process died (")
    assert told in failure.error
    assert "\n" not in failure.error
    assert failure.details == str(error)


@pytest.mark.parametrize(
    ("cause", "blame"),
    [
        (WorkerUnreadyError("why", "trace"), Blame.WORKER),
        (WorkerBusyError("why", "trace"), Blame.NOBODY),
        (TrialBrokeOffError("why", "trace"), Blame.TRIAL),
    ],
    ids=["unready", "busy", "broke off"],
)
def test_our_own_errors_come_through(cause: Exception, blame: Blame) -> None:
    sent = pickle.loads(pickle.dumps(cause))
    failure = understand(RayTaskError("train", "Traceback", sent))
    assert (failure.blame, failure.error, failure.details) == (blame, "why", "trace")


def test_any_other_error_is_the_trials() -> None:
    failure = understand(RayTaskError("train", "Traceback", ValueError("no such layer\nat all")))
    assert (failure.blame, failure.error) == (Blame.TRIAL, "ValueError: no such layer")
    assert "Traceback" in failure.details


class Idle:
    """An actor."""


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("survives", [True, False])
def test_a_worker_that_ran_out_of_memory_doesnt_end_the_run(survives: bool) -> None:
    manager = RayActorManager(resource_manager=FixedResourceManager())
    deaths: list[Exception] = []
    actor = manager.add_actor(
        Idle, {}, ResourceRequest([{"CPU": 1}]), on_error=lambda _actor, error: deaths.append(error)
    )
    while not manager.is_actor_started(actor):
        manager.next(timeout=1)
    error = OutOfMemoryError("the node is low on memory")
    ended = nullcontext() if survives else pytest.raises(RuntimeError, match="unexpected exception")
    with survive_deaths() if survives else nullcontext(), ended:
        manager._actor_task_failed(tracked_actor_task=TrackedActorTask(actor), exception=error)
    assert [isinstance(death, RayActorError) for death in deaths] == [True] * survives
    assert [understand(death).error for death in deaths] == [
        "the worker process died (Ray ended it as its machine ran out of memory)"
    ] * survives
    manager.cleanup()
