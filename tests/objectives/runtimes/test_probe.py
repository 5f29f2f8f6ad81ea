"""The probe sees what a runtime really executes, also where that isn't what it declares."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from paretune.errors import JobError, TrialError
from paretune.objectives.cache import store
from paretune.objectives.runtimes import Capabilities, LayerReport, LoadOptions, Session
from paretune.objectives.runtimes.base import Array, Arrays
from paretune.objectives.runtimes.openvino import OpenVINO
from paretune.objectives.runtimes.probe import Probe, ProbedLayer, cpu_features, hardware, machine_key, probe, run_probe


class Unkept(OpenVINO):
    """Declares 3 bits for linear layers, but has no scheme for them; can't run Conv1d with a batch of 1."""

    def capabilities(self, device: str) -> Capabilities:
        return replace(super().capabilities(device), integer_bits={"Linear": (8, 3), "Conv1d": (8,)})

    def load(self, path: Path, options: LoadOptions) -> Session:
        session = super().load(path, options)
        return Forgetful(session) if options.float_bits == 32 else session


class Forgetful(Session):
    """Runs in floats what it says it runs in 16 bits, and doesn't know the second layer."""

    def __init__(self, session: Session) -> None:
        self.settings = session.settings
        self._session = session

    def run(self, inputs: Arrays) -> Array:
        if next(iter(inputs.values())).shape == (8, 16, 64):
            raise TrialError("no kernel\nfor that")
        return self._session.run(inputs)

    def bind(self, inputs: Arrays) -> Callable[[], object]:
        return self._session.bind(inputs)

    def layers(self) -> dict[str, LayerReport]:
        return {name: LayerReport(16, 0.0) for name in self._session.layers() if name != "layers.1"}


@pytest.fixture(scope="module")
def openvino() -> Probe:
    return run_probe(OpenVINO(), "openvino", "cpu")


def test_openvino_executes_what_it_declares(openvino: Probe) -> None:
    assert openvino.failures == ()
    assert openvino.float_bits == OpenVINO().capabilities("cpu").float_bits
    assert {"Conv1d", "Conv2d", "Conv2d, depthwise", "Conv2d, grouped", "Conv3d", "Linear"} <= set(openvino.kinds)
    for kind in openvino.kinds:
        declared = OpenVINO().capabilities("cpu").widths(kind.partition(",")[0])
        assert openvino.widths(kind) == declared
        assert {layer.batch_size for layer in openvino.layers if layer.kind == kind} == {1, 8}


def test_a_probe_survives_json(openvino: Probe) -> None:
    assert Probe.from_dict(json.loads(json.dumps(openvino.to_dict()))) == openvino


def test_what_a_runtime_does_not_keep_is_named() -> None:
    found = run_probe(Unkept(), "unkept", "cpu")
    assert 3 not in found.widths("Linear")
    reasons = {(layer.kind, layer.asked): layer.reason for layer in found.failures}
    assert reasons["Linear", 3]  # whatever was raised for want of a scheme
    # 32 bits were asked, and 16 reported; the second layer of each net wasn't reported at all.
    linear = {layer.shape: layer for layer in found.layers if (layer.kind, layer.asked) == ("Linear", 32)}
    assert (linear["32 to 32"].executed, linear["32 to 32"].reason) == (16, "it ran in 16 bits")
    assert (linear["32 to 512"].executed, linear["32 to 512"].reason) == (None, "the runtime doesn't report it")
    assert found.widths("Linear, on tokens") == (*(width for width in found.float_bits if width != 32), 8)
    # One layer alone raises as well, in one line.
    assert {layer.reason for layer in found.failures if (layer.kind, layer.asked) == ("Conv1d", 32)} == {
        "TrialError: no kernel"
    }


def test_a_width_counts_only_where_every_shape_and_batch_ran_so() -> None:
    ran = ProbedLayer("Conv2d", "3x3", 1, 8, 8, "")
    other = replace(ran, batch_size=8)
    assert Probe("r", "cpu", (32,), (ran, other)).widths("Conv2d") == (8,)
    failed = replace(other, executed=32, reason="it ran in 32 bits")
    assert Probe("r", "cpu", (32,), (ran, failed)).widths("Conv2d") == ()
    assert Probe("r", "cpu", (32,), (ran,)).widths("Conv3d") == ()


def test_probes_are_kept_and_read_again(openvino: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = replace(openvino, layers=openvino.layers[:1])
    store("probe", machine_key(OpenVINO(), "openvino", "cpu"), known.to_dict())
    assert probe("openvino", "cpu") == known
    assert probe("openvino", "cpu", fresh=True) == openvino
    assert probe("openvino", "cpu") == openvino
    (file,) = (tmp_path / "paretune").iterdir()
    file.write_text("{}")
    assert probe("openvino", "cpu") == openvino
    assert json.loads(file.read_text())["value"]


def test_a_device_that_a_runtime_has_not_is_an_error() -> None:
    with pytest.raises(JobError, match=r"target\.device"):
        probe("openvino", "tpu")


def test_keys_tell_machines_and_versions_apart() -> None:
    key = machine_key(OpenVINO(), "openvino", "cpu")
    assert key["versions"].keys() == {"torch", "onnx", "openvino"}
    assert "not installed" not in key["versions"].values()
    assert key["hardware"] == hardware("cpu")
    assert key["hardware"]["processor"]


def test_features_of_a_processor(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu avx2 sse4_2 avx512_vnni\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert cpu_features(info) == ["avx2", "avx512_vnni"]
    info.write_text("Features\t: fp asimd i8mm bf16 sve\n")
    assert cpu_features(info) == ["asimd", "i8mm", "bf16"]
    info.write_text("nothing\n")
    assert cpu_features(info) == cpu_features(tmp_path / "missing") == []
