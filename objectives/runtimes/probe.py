"""What a runtime really executes: small nets of every kind of layer, built, quantized, deployed, loaded and read back.

`Runtime.capabilities` is a declaration. The search holds it to the user's model (`objectives.baseline.probe_widths`),
this module to nets that need no job, for `paretune doctor`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paretune import __version__
from paretune.objectives.cache import recall, store
from paretune.objectives.compress import Context, compress_numerics
from paretune.objectives.data.splits import Batch
from paretune.objectives.device import Device, is_cuda
from paretune.objectives.environment import environment, version
from paretune.objectives.runtimes import LoadOptions, Runtime, get_runtime
from paretune.objectives.runtimes.onnx_export import named_arrays
from paretune.objectives.tasks import Classification
from paretune.spaces.plan import CompressionPlan, Quantization

BATCH_SIZES = (1, 8)
"""Batches of the probe: kernels for a single sample are often others."""

_FEATURES = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
)
"""Features of x86 and ARM processors (/proc/cpuinfo) that decide which kernels there are."""


_UNREPORTED = "the runtime doesn't report it"


@dataclass(frozen=True)
class ProbedLayer:
    """One layer of the probe, asked for in one width.

    Attributes:
        kind: Class name, and what sets it apart, e.g. ``"Conv2d, depthwise"``.
        shape: Kernel and channels, e.g. ``"3x3, 16 to 64"``.
        batch_size: Samples a call.
        asked: Width that the runtime declares for it.
        executed: Width in which it ran; None where it didn't run or the runtime doesn't report it.
        reason: Why `executed` isn't `asked`, else empty.
    """

    kind: str
    shape: str
    batch_size: int
    asked: int
    executed: int | None
    reason: str


@dataclass(frozen=True)
class Probe:
    """What a runtime was seen to execute on a device.

    Attributes:
        runtime: Name of the runtime.
        device: What it ran on.
        float_bits: Float widths that it declares.
        layers: Every layer, width and batch that was tried.
    """

    runtime: str
    device: str
    float_bits: tuple[int, ...]
    layers: tuple[ProbedLayer, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that were tried."""
        return tuple(dict.fromkeys(layer.kind for layer in self.layers))

    def widths(self, kind: str) -> tuple[int, ...]:
        """Widths that ran as asked for every shape and batch of that kind, widest first."""
        tried = [layer for layer in self.layers if layer.kind == kind]
        failed = {layer.asked for layer in tried if layer.executed != layer.asked}
        return tuple(sorted({layer.asked for layer in tried} - failed, reverse=True))

    @property
    def failures(self) -> tuple[ProbedLayer, ...]:
        """What didn't run as asked."""
        return tuple(layer for layer in self.layers if layer.executed != layer.asked)

    @property
    def raised(self) -> bool:
        """Whether anything wasn't run at all."""
        return any(layer.executed is None and layer.reason != _UNREPORTED for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Probe:
        """Undo `to_dict`."""
        layers = tuple(ProbedLayer(**layer) for layer in data["layers"])
        return cls(**data | {"float_bits": tuple(data["float_bits"]), "layers": layers})


class _Case(NamedTuple):
    """A layer to try, and what the record calls it."""

    kind: str
    shape: str
    channels: int
    groups: int = 1
    kernel: int = 3
    stride: int = 1


class _Chain(NamedTuple):
    """Layers of one class that follow each other in one net.

    Attributes:
        layer: Class name, under which a runtime declares its widths.
        inputs: Shape of a sample.
        cases: The layers.
        features: Which axis of the sample holds the channels.
    """

    layer: str
    inputs: tuple[int, ...]
    cases: tuple[_Case, ...]
    features: int = 0

    def channels(self) -> list[int]:
        """Input channels of the first layer, then the output channels of each."""
        return [self.inputs[self.features], *(case.channels for case in self.cases)]

    def split(self) -> Iterator[_Chain]:
        """Each layer in a chain of its own."""
        for case, channels in zip(self.cases, self.channels(), strict=False):
            inputs = list(self.inputs)
            inputs[self.features] = channels
            yield self._replace(inputs=tuple(inputs), cases=(case,))


_CHAINS = (
    _Chain(
        "Conv2d",
        (16, 16, 16),
        (
            _Case("Conv2d", "3x3, 16 to 16", 16),
            _Case("Conv2d", "3x3, 16 to 64", 64),
            _Case("Conv2d", "1x1, 64 to 64", 64, kernel=1),
            _Case("Conv2d", "3x3 stride 2, 64 to 64", 64, stride=2),
            _Case("Conv2d", "1x1 stride 2, 64 to 128", 128, kernel=1, stride=2),
        ),
    ),
    _Chain(
        "Conv2d",
        (16, 16, 16),
        (
            _Case("Conv2d, depthwise", "3x3, 16", 16, groups=16),
            _Case("Conv2d", "1x1, 16 to 96", 96, kernel=1),
            _Case("Conv2d, depthwise", "3x3, 96", 96, groups=96),
        ),
    ),
    _Chain(
        "Conv2d",
        (16, 16, 16),
        (
            _Case("Conv2d, grouped", "3x3, 16 to 64 in 4 groups", 64, groups=4),
            _Case("Conv2d, grouped", "3x3, 64 to 64 in 4 groups", 64, groups=4),
        ),
    ),
    _Chain("Conv1d", (16, 64), (_Case("Conv1d", "3, 16 to 16", 16), _Case("Conv1d", "3, 16 to 64", 64))),
    _Chain(
        "Conv3d",
        (8, 4, 8, 8),
        (_Case("Conv3d", "3x3x3, 8 to 16", 16), _Case("Conv3d", "3x3x3, 16 to 32", 32)),
    ),
    _Chain("Linear", (32,), (_Case("Linear", "32 to 32", 32), _Case("Linear", "32 to 512", 512))),
    _Chain(
        "Linear",
        (16, 64),
        (_Case("Linear, on tokens", "64 to 64", 64), _Case("Linear, on tokens", "64 to 256", 256)),
        features=1,
    ),
)


class _Net(nn.Module):
    """A chain's layers one after the other, a ReLU behind each, and a mean over the positions."""

    def __init__(self, chain: _Chain) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _build(chain.layer, case, inputs) for case, inputs in zip(chain.cases, chain.channels(), strict=False)
        )
        self._positions = [axis + 1 for axis in range(len(chain.inputs)) if axis != chain.features]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.mean(self._positions) if self._positions else x


def _build(layer: str, case: _Case, inputs: int) -> nn.Module:
    if layer == "Linear":
        return nn.Linear(inputs, case.channels)
    convolution = {"Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d}[layer]
    padding = case.kernel // 2
    return convolution(inputs, case.channels, case.kernel, stride=case.stride, padding=padding, groups=case.groups)


def probe(name: str, device: str, *, fresh: bool = False) -> Probe:
    """What a runtime really executes on a device; measured once, then read from the cache.

    Args:
        name: Name of the runtime.
        device: The runtime's device.
        fresh: Measure even where the cache has it.

    Raises:
        JobError: There is no such runtime, what it needs isn't installed, or it doesn't have the device.
    """
    runtime = get_runtime(name)
    key = machine_key(runtime, name, device)
    found = None if fresh else recall("probe", key, Probe.from_dict)
    if found is None:
        found = run_probe(runtime, name, device)
        if not found.raised:  # a missing compiler or a full memory won't last
            store("probe", key, found.to_dict())
    return found


def run_probe(runtime: Runtime, name: str, device: str) -> Probe:
    """Try every kind of layer in every width that the runtime declares for it.

    Raises:
        JobError: The runtime doesn't have the device.
    """
    capabilities = runtime.capabilities(device)
    found: list[ProbedLayer] = []
    with torch.random.fork_rng(devices=[]), Device(device).shared():
        torch.manual_seed(0)
        for chain in _CHAINS:
            for width in capabilities.widths(chain.layer):
                found += _try_width(runtime, device, chain, width)
    return Probe(name, device, capabilities.float_bits, tuple(found))


def _try_width(runtime: Runtime, device: str, chain: _Chain, width: int) -> list[ProbedLayer]:
    """All layers of the chain at once; where that raises, each by itself, so that one is known to be at fault."""
    try:
        return _try_chain(runtime, device, chain, width)
    except Exception as error:  # whatever a runtime raises for what it can't do is the finding
        if len(chain.cases) == 1:
            case, reason = chain.cases[0], first_line(error)
            return [ProbedLayer(case.kind, case.shape, size, width, None, reason) for size in BATCH_SIZES]
    return [layer for single in chain.split() for layer in _try_width(runtime, device, single, width)]


def _try_chain(runtime: Runtime, device: str, chain: _Chain, width: int) -> list[ProbedLayer]:
    floats = runtime.capabilities(device).float_bits
    names = [f"layers.{position}" for position in range(len(chain.cases))]
    samples = torch.randn(max(BATCH_SIZES), *chain.inputs)
    found = []
    with TemporaryDirectory(prefix="paretune-probe-") as folder:
        path = Path(folder) / f"model{runtime.suffix}"
        deploy_net(runtime, device, _Net(chain), samples, dict.fromkeys(names, width), path)
        for size in BATCH_SIZES[-1:] if runtime.compiles else BATCH_SIZES:
            options = LoadOptions(size, float_bits=width if width in floats else floats[-1], device=device)
            session = runtime.load(path, options)
            session.run(named_arrays(samples[:size]))  # some runtimes find out only now that they can't
            reports = session.layers()
            for case, name in zip(chain.cases, names, strict=True):
                executed = reports[name].bits if name in reports else None
                found.append(ProbedLayer(case.kind, case.shape, size, width, executed, _reason(width, executed)))
    return found


def _reason(asked: int, executed: int | None) -> str:
    if executed is None:
        return _UNREPORTED
    return "" if executed == asked else f"it ran in {executed} bits"


def deploy_net(
    runtime: Runtime, device: str, net: nn.Module, samples: Tensor, bits: Mapping[str, int], path: Path
) -> None:
    """Quantize a net of ours, calibrated on samples, and write it as the runtime's model file.

    Args:
        runtime: Deploys it.
        device: Decides how layers are quantized.
        net: Takes one tensor.
        samples: At least two of them.
        bits: Layer name to width.
        path: Where the model file goes.
    """
    batch = Batch(torch.arange(len(samples)), samples, torch.zeros(len(samples), dtype=torch.int64))
    schemes = runtime.capabilities(device).schemes
    context = Context(samples[:2], {}, Classification(), [batch], schemes)
    plan = CompressionPlan(quantize=Quantization(bits=dict(bits)))
    runtime.deploy(compress_numerics(net, plan, context), samples[:2], path)


def first_line(error: Exception) -> str:
    """An error in one line of at most 200 characters."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def machine_key(runtime: Runtime, name: str, device: str) -> dict[str, Any]:
    """What a measurement of a runtime on a device holds for; JSON-able."""
    versions = {package: version(package) for package in ("torch", "onnx", *runtime.packages)}
    return {
        "paretune": __version__,
        "runtime": name,
        "device": device,
        "hardware": hardware(device),
        "versions": versions,
    }


def hardware(device: str) -> dict[str, Any]:
    """What a device is: a CPU's name, features and cores, a GPU's name, capability and CUDA version."""
    if is_cuda(device):
        gpu = torch.cuda.get_device_properties(torch.device(device))
        return {"gpu": gpu.name, "capability": [gpu.major, gpu.minor], "cuda": torch.version.cuda}
    facts = environment()
    return {"processor": facts["processor"], "cores": facts["cores"], "features": cpu_features()}


def cpu_features(path: Path = Path("/proc/cpuinfo")) -> list[str]:
    """Those features of the processor that decide which kernels run; empty where they can't be read.

    A processor's name may stand for several generations, as ``AMD EPYC`` does in virtual machines.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    return [feature for feature in _FEATURES if feature in flags]
