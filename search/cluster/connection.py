"""The connection to a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ray

from paretune.errors import JobError
from paretune.objectives.device import is_cuda
from paretune.search.job import Job
from paretune.search.job_sections import RaySection, TrialResources
from paretune.search.local import cores

_REACH_SECONDS = 10.0

_JOIN_SECONDS = 60.0
"""The nodes of a cluster that was started a moment ago may still be joining it."""


@dataclass(frozen=True)
class Connection:
    """A connection to a cluster, made by `connect`; one that the caller had made before isn't ours to end."""

    is_ours: bool

    def close(self) -> None:
        """End what `connect` began: a Ray of our own with its processes, or else the connection alone."""
        if self.is_ours:
            ray.shutdown()


def connect(job: Job) -> Connection:
    """Connect to the job's cluster, or start a Ray on this machine where it names none.

    A Ray that the caller has initialized is used, and left running. ``RAY_ADDRESS``, which Ray sets for submitted jobs,
    stands for an address that isn't given.

    Raises:
        JobError: There is no such cluster, or it has no nodes that fit.
    """
    section, is_ours = job.ray, not ray.is_initialized()
    address = section.address or os.environ.get("RAY_ADDRESS") or "local"
    if is_ours:
        _begin(section, address)
    connection = Connection(is_ours)
    try:
        _refuse_client()
        if not is_ours:
            _check_given(section)
        _await_nodes(job, _JOIN_SECONDS if is_ours and address != "local" else 0.0)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_given(section: RaySection) -> None:
    """See that a Ray which was initialized before is what the job asks for."""
    remedy = "leave it out, or don't call ray.init before"
    given = ray.get_runtime_context().gcs_address
    if section.address not in (None, "auto", given):
        rule = "must be the cluster that this process is connected to already"
        raise JobError("ray.address", rule, f"{section.address!r}, not {given!r}", remedy)
    if section.runtime_env:
        raise JobError("ray.runtime_env", "must be empty where ray.init was called before", section.runtime_env, remedy)


def _begin(section: RaySection, address: str) -> None:
    options: dict[str, Any] = {"runtime_env": section.runtime_env or None}
    if address == "local":
        options |= {"include_dashboard": False, "num_cpus": cores()}
    _check_address(address)
    with _own_sigterm():
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:  # ConnectionError, RuntimeError (versions), ValueError (runtime_env), its own ones
            ray.shutdown()
            remedy = "start it (ray start --head), with the same versions of Ray and Python, or leave ray.address out"
            raise _unreachable(address, f"{type(error).__name__}: {error}", remedy) from error


def _check_address(address: str) -> None:
    """Refuse in seconds what Ray would try for minutes, and what no driver of ours can work with."""
    if address.startswith("ray://"):
        raise _unreachable(address, "Ray Client", "give HOST:6379, or submit the job with `paretune submit`")
    host, _, port = address.rpartition(":")
    if address in ("local", "auto"):
        return
    if address.startswith("http"):
        raise _unreachable(address, "the dashboard's", "unset RAY_ADDRESS, or set ray.address, e.g. to auto")
    if not host or not port.isdecimal():
        raise _unreachable(address, "neither auto nor HOST:PORT", "write e.g. auto or head-node:6379")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_SECONDS).close()
    except OSError as error:
        remedy = "start it (ray start --head --port=6379), or correct ray.address"
        raise _unreachable(address, f"{type(error).__name__}: {error}", remedy) from error


def _unreachable(address: str, why: str, remedy: str) -> JobError:
    return JobError("ray.address", "must be a Ray cluster that can be reached", f"{address!r} ({why})", remedy)


def _refuse_client() -> None:
    if ray.util.client.ray.is_connected():  # type: ignore[no-untyped-call]
        raise _unreachable("ray://…", "Ray Client", "call ray.init with the cluster's own address, HOST:6379")


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the handler that is there: ray.init sets one of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _await_nodes(job: Job, seconds: float) -> None:
    """Wait until the cluster can run the job, for so long."""
    end = time.monotonic() + seconds
    while error := lacking(ray.nodes(), job.ray, gauge_takes(job)):  # type: ignore[no-untyped-call]
        if time.monotonic() >= end:
            raise error
        time.sleep(1.0)


def gauge_takes(job: Job) -> dict[str, float]:
    """What a gauge takes of its node, in Ray's names; nothing where it shares the driver's."""
    if job.ray.measure is None:
        return {}
    gpus = [int(device.partition(":")[2] or 0) for device in job.devices if is_cuda(device)]
    return {job.ray.measure: 1.0} | ({"GPU": float(max(gpus) + 1)} if gpus else {})


def lacking(
    nodes: Sequence[Mapping[str, Any]], section: RaySection, takes: Mapping[str, float] = MappingProxyType({})
) -> JobError | None:
    """Why a cluster can't run a job: no node has what a trial takes, or what the job's measuring nodes must have.

    Args:
        nodes: As `ray.nodes` tells them.
        section: What the job wants of them.
        takes: What a gauge takes of each measuring node.

    Returns:
        None where it can.
    """
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    wanted = amounts(section.resources)
    left = [{k: v - takes.get(k, 0.0) if section.measure in node else v for k, v in node.items()} for node in alive]
    if not any(all(node.get(name, 0.0) >= amount for name, amount in wanted.items()) for node in left):
        rule = f"must fit on one node: {_words(wanted)}"
        has = "; ".join(_words({name: node.get(name, 0.0) for name in wanted}) for node in left) or "no nodes"
        return JobError(
            "ray.resources", rule, f"nodes with {has} beside what measures", "ask for less, or start larger nodes"
        )
    measuring = {node[section.measure] for node in alive if section.measure in node}
    if section.measure is None or measuring == {1.0}:
        return None
    given = ", ".join(f"{amount:g}" for amount in sorted(measuring)) or "none"
    return JobError(
        "ray.measure",
        "must be a resource of which each measuring node has 1, because one artifact at a time is measured there",
        f"{section.measure!r}, of which nodes have {given}",
        f"start them with --resources='{{\"{section.measure}\": 1}}', or leave ray.measure out",
    )


def amounts(resources: TrialResources) -> dict[str, float]:
    """What a trial takes, as Ray names it."""
    named = {"CPU": resources.cpu, "GPU": resources.gpu, "memory": (resources.memory_gb or 0.0) * 1e9}
    return {name: amount for name, amount in (named | resources.custom).items() if amount > 0}


def _words(amounts: Mapping[str, float]) -> str:
    return ", ".join(
        f"{amount / 1e9:.3g} GB of memory" if name == "memory" else f"{amount:g} {name}"
        for name, amount in amounts.items()
    )
