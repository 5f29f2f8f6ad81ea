"""The doctor says what was tried, and what about a machine spoils measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from paretune.objectives.runtimes import RUNTIMES
from paretune.objectives.runtimes.openvino import OpenVINO
from paretune.objectives.runtimes.probe import Probe, ProbedLayer
from paretune.search.doctor import Diagnosis, Finding, concerns, diagnose, examine, facts, print_diagnosis

MACHINE: dict[str, Any] = {
    "system": "Linux 6",
    "processor": "A CPU",
    "cores": 8,
    "memory_gib": 32.0,
    "governor": "performance",
    "boost": "on",
    "features": ["avx2", "avx512_vnni", "avx512_bf16"],
    "load": 0.2,
    "gpus": [],
}
GPU = {"name": "GPU", "memory_gib": 80.0, "capability": "9.0", "cuda": "13.0", "driver": "580.1"}
RAN = ProbedLayer("Conv2d", "3x3, 16 to 16", 1, 8, 8, "")
FAILED = ProbedLayer("Linear", "32 to 32", 1, 8, 32, "it ran in 32 bits")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        pytest.param({}, "", id="nothing to say"),
        pytest.param({"governor": "not readable", "features": []}, "", id="what can't be read is no fault"),
        pytest.param({"cores": 1}, "one core", id="one core"),
        pytest.param({"features": ["avx2", "avx512_bf16"]}, "int8", id="no VNNI"),
        pytest.param({"features": ["avx2", "avx_vnni"]}, "bfloat16", id="no bf16"),
        pytest.param({"governor": "powersave"}, "'powersave'", id="governor"),
        pytest.param({"load": 4.0}, "a load of 4.0 on 8 cores", id="busy"),
        pytest.param({"gpus": [GPU]}, "", id="a GPU"),
        pytest.param({"gpus": [GPU | {"driver": None}]}, "NVML", id="a GPU without NVML"),
    ],
)
def test_concerns(changed: dict[str, Any], expected: str) -> None:
    found = concerns(MACHINE | changed)
    assert len(found) == bool(expected)
    assert expected in "".join(found)


def test_facts_of_this_machine() -> None:
    assert facts().keys() == MACHINE.keys()
    json.dumps(facts())


def test_a_runtime_that_works() -> None:
    found = examine("openvino", "cpu")
    assert found.probe is not None
    assert found.versions.keys() == set(OpenVINO.packages)
    data = found.to_dict()
    assert data["works"]
    assert data["executed"]["Conv2d"] == OpenVINO().capabilities("cpu").widths("Conv2d")
    assert len(data["layers"]) == len(found.probe.layers)


def test_a_device_that_a_runtime_has_not() -> None:
    found = examine("openvino", "tpu")
    assert found.probe is None
    assert "target.device" in found.reason
    assert not found.to_dict()["works"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        pytest.param("import no_such_package_at_all", "no_such_package_at_all", id="not installed"),
        pytest.param("raise OSError('libcuda.so: cannot open')", "OSError: libcuda.so", id="broken"),
    ],
)
def test_a_runtime_that_cannot_be_loaded(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_runtime.py").write_text(source + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(RUNTIMES, "broken", ("broken_runtime", "Broken"))
    found = examine("broken", "cpu")
    assert found.probe is None
    assert reason in found.reason
    sys.modules.pop("broken_runtime", None)


def test_every_runtime_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RUNTIMES.keys() - {"openvino"}:
        monkeypatch.delitem(RUNTIMES, name)
    monkeypatch.setitem(RUNTIMES, "missing", ("no_such_module_at_all", "Missing"))
    lines: list[str] = []
    found = diagnose(report=lines.append)
    assert {finding.runtime: finding.probe is not None for finding in found.findings} == {
        "openvino": True,
        "missing": False,
    }
    assert found.works
    assert len(lines) == len(found.findings)
    json.dumps(found.to_dict())


def test_nothing_works() -> None:
    assert not Diagnosis(MACHINE, (Finding("r", "cpu", {}, None, "no such package"),), ()).works


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    works = Finding("good", "cpu", {"package": "1.2"}, Probe("good", "cpu", (32,), (RAN, FAILED)))
    broken = Finding("bad", "cpu", {}, None, "no such package")
    print_diagnosis(Diagnosis(MACHINE | {"gpus": [GPU]}, (works, broken), ("it is noisy",)))
    text = capsys.readouterr().out
    assert "good on cpu: Linear in 8 bits: it ran in 32 bits" in text
    assert "no: no such package" in " ".join(text.replace("│", " ").split())
    assert "gpu: name GPU" in text
    assert "warning: it is noisy" in text
