"""The lock of a device between processes, told by what the processes say and when."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from paretune.errors import JobError
from paretune.objectives.device import Device, foreign_processes, gpu_uuid, is_cuda, lock_name
from paretune.objectives.nvml import GpuProcess, GpuState

PATIENCE = 30.0
SHORT = 0.5
MOMENT = 0.3
"""Long enough for a process to say that it got a lock that is free."""

SCRIPT = """
import sys
from paretune.objectives.device import Device

device = Device(*sys.argv[1].split("+"))
print("ready", flush=True)
for line in sys.stdin:
    command = line.strip()
    if command == "step":
        device.step_aside()
        print("stepped", flush=True)
        continue
    with getattr(device, command)():
        print("got", flush=True)
        for inner in sys.stdin:
            if inner.strip() == "release":
                break
            if inner.strip() == "step":
                device.step_aside()
                print("stepped", flush=True)
    print("released", flush=True)
"""


class Process:
    """Another process that holds the device, or waits for it."""

    def __init__(self, name: str, script: Path) -> None:
        self._output = script.with_suffix(f".{uuid.uuid4().hex}")
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(script), name], stdin=subprocess.PIPE, stdout=output, text=True
            )
        self._seen = 0
        assert self.next() == "ready"

    def say(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def next(self, timeout: float = PATIENCE) -> str | None:
        """What it says next; None where it says nothing for so long."""
        lines: list[str] = []

        def told() -> bool:
            lines[:] = self._output.read_text().splitlines()
            return len(lines) > self._seen

        if not wait(told, timeout):
            return None
        self._seen += 1
        return lines[self._seen - 1]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)


def wait(condition: Callable[[], bool], timeout: float) -> bool:
    end = time.monotonic() + timeout
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lock files go to the test's folder, for this process and those that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture
def name() -> str:
    return "cuda:0/a"


@pytest.fixture
def start(name: str, tmp_path: Path) -> Iterator[Callable[[], Process]]:
    script = tmp_path / "holder.py"
    script.write_text(SCRIPT)
    processes: list[Process] = []

    def begin() -> Process:
        processes.append(Process(name, script))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()


@pytest.mark.parametrize(
    ("holder", "waiter", "excludes"),
    [
        pytest.param("exclusive", "exclusive", True, id="two measurements"),
        pytest.param("exclusive", "shared", True, id="a worker waits for a measurement"),
        pytest.param("shared", "exclusive", True, id="a measurement waits for a worker"),
        pytest.param("shared", "shared", False, id="two workers"),
    ],
)
def test_who_excludes_whom(start: Callable[[], Process], holder: str, waiter: str, excludes: bool) -> None:
    one, other = start(), start()
    one.say(holder)
    assert one.next() == "got"
    other.say(waiter)
    if excludes:
        assert other.next(MOMENT) is None
        one.say("release")
    assert other.next() == "got"


def test_other_devices_dont_exclude(start: Callable[[], Process]) -> None:
    process = start()
    process.say("exclusive")
    assert process.next() == "got"
    with Device("cpu").exclusive():
        assert process.process.poll() is None


def test_stepping_aside_lets_a_measurement_go_first(start: Callable[[], Process]) -> None:
    worker, measurement = start(), start()
    worker.say("shared")
    assert worker.next() == "got"
    measurement.say("exclusive")
    assert measurement.next(MOMENT) is None
    worker.say("step")
    assert measurement.next() == "got"
    assert worker.next(MOMENT) is None, "the worker waits meanwhile"
    measurement.say("release")
    assert measurement.next() == "released"
    assert worker.next() == "stepped"


def test_a_waiting_measurement_comes_before_new_workers(start: Callable[[], Process]) -> None:
    first, measurement, second = start(), start(), start()
    first.say("shared")
    assert first.next() == "got"
    measurement.say("exclusive")
    assert measurement.next(MOMENT) is None
    second.say("shared")
    assert second.next(MOMENT) is None
    first.say("release")
    assert measurement.next() == "got"
    assert second.next(MOMENT) is None
    measurement.say("release")
    assert second.next() == "got"


@pytest.mark.parametrize("holder", ["exclusive", "shared"])
def test_a_killed_process_frees_the_device(start: Callable[[], Process], holder: str) -> None:
    dying, waiter = start(), start()
    dying.say(holder)
    assert dying.next() == "got"
    waiter.say("exclusive")
    assert waiter.next(MOMENT) is None
    dying.kill()
    assert waiter.next() == "got"


def test_a_killed_waiter_frees_the_gate(start: Callable[[], Process]) -> None:
    worker, dying, other = start(), start(), start()
    worker.say("shared")
    assert worker.next() == "got"
    dying.say("exclusive")
    assert dying.next(MOMENT) is None
    dying.kill()
    other.say("shared")
    assert other.next() == "got"


def test_stepping_aside_without_a_writer_goes_on(start: Callable[[], Process]) -> None:
    worker = start()
    worker.say("step")
    assert worker.next() == "stepped", "not even holding it"
    worker.say("shared")
    assert worker.next() == "got"
    worker.say("step")
    assert worker.next() == "stepped"


def test_nesting_within_a_process(name: str, start: Callable[[], Process]) -> None:
    """A worker that measures gives up its own share meanwhile, and has it again afterwards."""
    device, other = Device(name), start()
    with device.shared():
        with device.shared():
            pass
        other.say("exclusive")
        assert other.next(MOMENT) is None, "leaving the inner block doesn't free the device"
    assert other.next() == "got"
    other.say("release")
    assert other.next() == "released"
    with device.shared():
        with device.exclusive():
            other.say("shared")
            assert other.next(MOMENT) is None
        assert other.next() == "got"
        other.say("release")
        assert other.next() == "released"
        other.say("exclusive")
        assert other.next(MOMENT) is None, "the share is held again after measuring"
    assert other.next() == "got"


def test_an_error_inside_frees_the_device(name: str, start: Callable[[], Process]) -> None:
    device, other = Device(name), start()
    with pytest.raises(ZeroDivisionError), device.shared(), device.exclusive():
        raise ZeroDivisionError
    other.say("exclusive")
    assert other.next() == "got"


def test_lock_files_are_private(tmp_path: Path, name: str) -> None:
    with Device(name).exclusive():
        (folder,) = tmp_path.glob("paretune-*")
        assert folder.stat().st_mode & 0o077 == 0
        assert sorted(path.name for path in folder.iterdir()) == ["cuda-0-a.gate", "cuda-0-a.lock"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cuda", True),
        ("cuda:0", True),
        ("cuda:12", True),
        ("CUDA", False),
        ("cpu", False),
        ("GPU.0", False),
        ("cuda:", False),
    ],
)
def test_which_names_are_cuda(name: str, expected: bool) -> None:
    assert is_cuda(name) is expected


def test_a_gpu_is_locked_by_its_uuid() -> None:
    """One worker sees both GPUs, another only the second, as its first."""
    both = {"cuda": "AAAA-11", "cuda:0": "AAAA-11", "cuda:1": "BBBB-22"}
    second = {"cuda": "BBBB-22", "cuda:0": "BBBB-22"}
    assert lock_name("cuda", both.__getitem__) == lock_name("cuda:0", both.__getitem__) == "gpu-aaaa-11"
    assert lock_name("cuda:1", both.__getitem__) == lock_name("cuda:0", second.__getitem__) == "gpu-bbbb-22"


def test_other_devices_are_locked_by_name() -> None:
    def never(name: str) -> str:
        raise AssertionError(name)

    assert [lock_name(name, never) for name in ("cpu", "GPU.0", "cuda:0/a")] == ["cpu", "gpu.0", "cuda-0-a"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_isnt_there() -> None:
    with pytest.raises(JobError, match=r"'cuda:1' with 0 of them visible"):
        Device("cuda:1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_has_one_lock_under_both_names() -> None:
    assert uuid.UUID(gpu_uuid("cuda"))
    assert lock_name("cuda") == lock_name(f"cuda:{torch.cuda.current_device()}")
    with pytest.raises(JobError, match="must be a GPU that PyTorch sees"):
        gpu_uuid(f"cuda:{torch.cuda.device_count()}")


def test_foreign_processes() -> None:
    ours, theirs = GpuProcess(1, 100), GpuProcess(2, None)
    state = GpuState(processes=(ours, theirs))
    assert foreign_processes(state, [1, 3]) == (theirs,)
    assert foreign_processes(state, [1, 2]) == ()
    assert foreign_processes(GpuState(processes=None), [1]) is None


def test_several_devices_are_locked_as_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    both, one = Process("red+blue", script), Process("blue", script)
    try:
        one.say("shared")
        assert one.next() == "got"
        both.say("exclusive")
        assert both.next(SHORT) is None, "a reader of one of them is in the way"
        one.say("step")
        assert both.next() == "got"
        assert one.next(SHORT) is None, "it waits until the measurement is over"
        both.say("release")
        assert both.next() == "released"
        assert one.next() == "stepped"
        both.say("shared")
        assert both.next() == "got", "readers don't exclude each other"
    finally:
        both.kill()
        one.kill()


def test_equal_devices_named_twice_are_one(tmp_path: Path) -> None:
    device = Device("red", "RED")
    with device.exclusive():
        pass  # locking the same file twice would never return
    with device.shared():
        assert device._reading
