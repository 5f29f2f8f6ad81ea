"""When TensorRT's engines are built and when they are kept, with a stand-in for the package: it needs a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from paretune.errors import TrialError
from paretune.objectives.runtimes import tensorrt_engine
from paretune.objectives.runtimes.tensorrt_engine import EngineCache, file_name, load_engine

FACTS = {"tensorrt": "11.4.0", "gpu": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    files = EngineCache(tmp_path / "new" / "folder")
    assert files.read("a.engine") is None
    files.write("a.engine", b"first")
    files.write("a.engine", b"second")
    files.write("b.engine", b"")
    assert (files.read("a.engine"), files.read("b.engine")) == (b"second", b"")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == ["a.engine", "b.engine"]


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(lambda stored: b"", id="empty"),
        pytest.param(lambda stored: stored[:20], id="short"),
        pytest.param(lambda stored: stored[:-1], id="torn"),
        pytest.param(lambda stored: stored[:-1] + b"?", id="changed"),
        pytest.param(lambda stored: b"?" + stored[1:], id="another digest"),
    ],
)
def test_a_damaged_file_counts_as_none(tmp_path: Path, damaged: object) -> None:
    files = EngineCache(tmp_path)
    files.write("a.engine", b"a plan")
    path = tmp_path / "a.engine"
    path.write_bytes(damaged(path.read_bytes()))  # type: ignore[operator]
    assert files.read("a.engine") is None
    files.write("a.engine", b"a plan")
    assert files.read("a.engine") == b"a plan"


def test_a_folder_that_cant_be_written_keeps_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    files = EngineCache(tmp_path / "file")
    files.write("a.engine", b"a plan")
    assert files.read("a.engine") is None


def test_those_used_longest_ago_go_first(tmp_path: Path) -> None:
    files = EngineCache(tmp_path, kept_bytes=3 * (32 + 100))
    for age, name in ((30, "a"), (20, "b"), (10, "c")):
        files.write(name, bytes(100))
        then = (tmp_path / name).stat().st_mtime - age
        os.utime(tmp_path / name, (then, then))
    assert files.read("a") is not None  # which makes it the latest
    files.write("d", bytes(100))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "c", "d"]
    files.write("large", bytes(1000))
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


@pytest.mark.parametrize(
    ("facts", "model"),
    [
        pytest.param({**FACTS, "tensorrt": "11.4.1"}, b"model", id="version"),
        pytest.param({**FACTS, "gpu": "NVIDIA H100"}, b"model", id="GPU"),
        pytest.param({**FACTS, "tf32": True}, b"model", id="option"),
        pytest.param(FACTS, b"models", id="model"),
        pytest.param(FACTS, b"", id="no model"),
    ],
)
def test_names_differ_with_whatever_matters(facts: dict[str, str | int | bool], model: bytes) -> None:
    name = file_name(FACTS, ".engine", b"model")
    assert file_name(dict(reversed(FACTS.items())), ".engine", b"model") == name
    assert file_name(facts, ".engine", model) != name
    assert name.endswith(".engine")


class StandIn(ModuleType):
    """What `load_engine` uses of the package: a "plan" is ``b"plan of "`` and the model, and an engine is its plan.

    Attributes:
        built: Models that were built.
        loads: Whether a plan can be loaded.
        timings: What kernels took, as builds were given it.
    """

    __version__ = "11.4.0"
    ILogger = type("ILogger", (), {"Severity": SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)})
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    BuilderFlag = SimpleNamespace(TF32="tf32", SPARSE_WEIGHTS="sparse weights")

    def __init__(self) -> None:
        super().__init__("tensorrt")
        self.built: list[bytes] = []
        self.loads: Callable[[bytes], bool] = lambda plan: True
        self.timings: list[bytes] = []
        self.flags: set[str] = set()

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: plan if self.loads(plan) else None)

    def Builder(self, log: Any) -> Any:  # noqa: N802
        def build(network: Any, config: Any) -> bytes | None:
            self.built.append(network.model)
            if network.model == b"impossible":
                log.log(1, "no kernel for that")
                return None
            return b"plan of " + network.model

        config = SimpleNamespace(
            set_flag=self.flags.add,
            clear_flag=self.flags.discard,
            create_timing_cache=lambda stored: stored,
            set_timing_cache=lambda timings, ignore_mismatch: self.timings.append(timings) or timings != b"foreign",
            get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"times"),
        )
        return SimpleNamespace(
            create_network=lambda flags: SimpleNamespace(model=b"", flags=flags),
            create_builder_config=lambda: config,
            build_serialized_network=build,
        )

    def OnnxParser(self, network: Any, log: Any) -> Any:  # noqa: N802
        def parse(model: bytes) -> bool:
            network.model = model
            return model != b"odd"

        return SimpleNamespace(
            parse=parse, num_errors=1, get_error=lambda index: SimpleNamespace(desc=lambda: "no importer for Odd")
        )


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    monkeypatch.setattr(tensorrt_engine, "gpu_facts", lambda device: FACTS)
    tensorrt_engine.logger.cache_clear()
    yield stand_in
    tensorrt_engine.logger.cache_clear()


def load(model: bytes, files: EngineCache, *, tf32: bool = False) -> Any:
    return load_engine(model, torch.device("cuda", 0), files, tf32=tf32)


def test_an_engine_is_built_once(tmp_path: Path, package: StandIn) -> None:
    for _ in range(2):
        assert load(b"model", EngineCache(tmp_path)) == b"plan of model"
    assert package.built == [b"model"]
    assert package.flags == {"sparse weights"}
    load(b"model", EngineCache(tmp_path), tf32=True)
    load(b"another", EngineCache(tmp_path), tf32=True)
    assert package.built == [b"model", b"model", b"another"]
    assert package.flags == {"sparse weights", "tf32"}


def test_an_engine_that_cant_be_loaded_is_built_anew(tmp_path: Path, package: StandIn) -> None:
    files = EngineCache(tmp_path)
    load(b"model", files)
    refusals = iter([False, True])
    package.loads = lambda plan: next(refusals)
    assert load(b"model", files) == b"plan of model"
    assert package.built == [b"model", b"model"]
    package.loads = lambda plan: False
    with pytest.raises(TrialError, match="can't be loaded"):
        load(b"model", files)


def test_builds_share_what_kernels_took(tmp_path: Path, package: StandIn) -> None:
    files = EngineCache(tmp_path)
    load(b"one", files)
    load(b"other", files)
    assert package.timings == [b"", b"times"]
    (kept,) = tmp_path.glob("*.timings")
    files.write(kept.name, b"foreign")
    load(b"third", files)
    assert package.timings[2:] == [b"foreign", b""]


@pytest.mark.parametrize(
    ("model", "reason"),
    [(b"odd", "isn't understood .no importer for Odd"), (b"impossible", "no engine can be built .no kernel for that")],
)
def test_what_tensorrt_says_is_passed_on(tmp_path: Path, package: StandIn, model: bytes, reason: str) -> None:
    for _ in range(2):
        with pytest.raises(TrialError, match=reason):
            load(model, EngineCache(tmp_path))
    assert not list(tmp_path.glob("*.engine"))
