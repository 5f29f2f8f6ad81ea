"""Builds TensorRT engines, once for each model, GPU and version: engines are kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from onnx import ModelProto

from paretune.errors import JobError, TrialError
from paretune.objectives.cache import cache_folder

KEPT_BYTES = 8 * 2**30
"""Engines beyond this are deleted, those first that weren't used for longest: each trial makes some."""

_RECIPE = 2
"""How engines are built; raised whenever `_build` changes, so that older ones aren't found any more."""

_DIGEST_BYTES = 32


def tensorrt() -> Any:
    """The package.

    Raises:
        JobError: It isn't installed, or doesn't find its libraries.
    """
    try:
        return import_module("tensorrt")
    except ImportError as error:
        raise JobError(
            "target.runtime",
            "'tensorrt' needs the package 'tensorrt'",
            str(error),
            "install paretune[tensorrt], or choose another runtime",
        ) from error


@cache
def logger() -> Any:
    """TensorRT's logger, which keeps the latest errors in its list `errors`.

    One for the process, because TensorRT goes on using the first that it was given while anything of it is alive.
    """
    trt = tensorrt()
    base: Any = trt.ILogger
    severe = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Log(base):  # type: ignore[misc]  # the package has no annotations
        def __init__(self) -> None:
            base.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in severe:
                self.errors.append(message)

    return Log()


def fix_batch(model: ModelProto, batch_size: int) -> None:
    """Give the first dimension of all inputs and outputs this size, in place: static shapes need no profiles."""
    for value in (*model.graph.input, *model.graph.output):
        shape = value.type.tensor_type.shape
        if shape.dim:
            shape.dim[0].dim_value = batch_size
    del model.graph.value_info[:]


class EngineCache:
    """Files that are expensive to make. A torn or changed one counts as none, as does what can't be read or written.

    Args:
        folder: Where they lie; it needn't exist.
        kept_bytes: How much of them is kept.
    """

    def __init__(self, folder: Path | None = None, kept_bytes: int = KEPT_BYTES) -> None:
        self._folder = folder or cache_folder() / "tensorrt"
        self._kept = kept_bytes

    def read(self, name: str) -> bytes | None:
        """What was written under the name."""
        path = self._folder / name
        try:
            stored = path.read_bytes()
            path.touch()
        except OSError:
            return None
        digest, data = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
        # TensorRT may crash, not only refuse, on a file that isn't what it wrote.
        return data if hashlib.sha256(data).digest() == digest else None

    def write(self, name: str, data: bytes) -> None:
        """Keep the data; readers see the old file or the new one, never a part."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".unfinished-") as folder:
                unfinished = Path(folder) / name
                unfinished.write_bytes(hashlib.sha256(data).digest() + data)
                unfinished.replace(self._folder / name)
            self._drop_oldest(self._folder / name)
        except OSError:
            return

    def _drop_oldest(self, latest: Path) -> None:
        files = [(path.stat(), path) for path in self._folder.iterdir() if path.is_file() and path != latest]
        room = self._kept - latest.stat().st_size
        for status, path in sorted(files, key=lambda file: file[0].st_mtime_ns, reverse=True):
            room -= status.st_size
            if room < 0:
                path.unlink(missing_ok=True)


def gpu_facts(device: torch.device) -> dict[str, str | int]:
    """What an engine is made for: TensorRT refuses it elsewhere, or it may be slower there."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "tensorrt": str(tensorrt().__version__),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def file_name(facts: Mapping[str, str | int | bool], suffix: str, model: bytes = b"") -> str:
    """Name of the file for these facts, and for a model."""
    described = json.dumps(facts, sort_keys=True).encode()
    return hashlib.sha256(hashlib.sha256(described).digest() + model).hexdigest()[:32] + suffix


def load_engine(model: bytes, device: torch.device, files: EngineCache, *, tf32: bool) -> Any:
    """The engine of a model, from the cache or newly built, on the current device.

    Raises:
        TrialError: TensorRT can't build it.
    """
    trt, facts = tensorrt(), gpu_facts(device)
    name = file_name({**facts, "tf32": tf32, "recipe": _RECIPE}, ".engine", model)
    runtime = trt.Runtime(logger())
    plan = files.read(name)
    engine = None if plan is None else runtime.deserialize_cuda_engine(plan)
    if engine is None:
        plan = _build(model, files, file_name(facts, ".timings"), tf32=tf32)
        files.write(name, plan)
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise _refused("its own engine can't be loaded", logger().errors)
    return engine


def _build(model: bytes, files: EngineCache, timings: str, *, tf32: bool) -> bytes:
    trt, log = tensorrt(), logger()
    log.errors.clear()
    builder = trt.Builder(log)
    # Strongly typed: every tensor has the type that the file gives it. TensorRT 11 knows nothing else.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model):
        raise _refused("the file isn't understood", [parser.get_error(i).desc() for i in range(parser.num_errors)])
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the engine doesn't say what it executes
    if tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    # It sees itself which weights have two zeros among every four inputs, and takes kernels for that where faster.
    config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    _use_timings(config, files.read(timings))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _refused("no engine can be built", log.errors)
    files.write(timings, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def _use_timings(config: Any, stored: bytes | None) -> None:
    """Give it what kernels took in other builds: layers that trials share choose the same ones, and at once."""
    for timings in (stored or b"", b""):
        timing_cache = config.create_timing_cache(timings)
        # It refuses what was timed on a GPU with other properties.
        if timing_cache is not None and config.set_timing_cache(timing_cache, ignore_mismatch=False):
            return


def _refused(what: str, errors: list[str]) -> TrialError:
    said = "; ".join(errors[:2]) or "no reason given"
    return TrialError(
        f"TensorRT must be able to build the model for the target's batch size, but {what} ({said}); "
        "don't fix the batch size in forward, or choose another runtime"
    )
