"""What can be pruned in twenty architectures of timm, and whether what is pruned runs.

    python benchmarks/models.py [--only NAME ...] [--output FILE]

For each model, in a process of its own: its groups; the layers that keep their channels, by reason; then every group is
cut to half of its channels at once. The cut model must hold what the plan says, run forward and backward, and give an
artifact that computes on OpenVINO what it does in PyTorch. Whether the right channels went is tried apart: a model
whose last channels were dead before must compute the same without them.

The weights are random and nothing is downloaded; images are small. timm and torchvision aren't dependencies of
paretune: install them first.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from reporting import machine, progress, save, table
from torch import Tensor, nn

from paretune.objectives.compress import Context, compress_numerics, compress_structure
from paretune.objectives.data import Batch
from paretune.objectives.models import ModelSource
from paretune.objectives.runtimes import LoadOptions, get_runtime
from paretune.objectives.tasks import Classification
from paretune.spaces.analysis import Analysis, analyse, count_macs
from paretune.spaces.copies import copy_of
from paretune.spaces.graph import PRUNABLE, Group, prune
from paretune.spaces.grid import channel_grid, ratio_of
from paretune.spaces.plan import CompressionPlan, Pruning

LIMIT_SECONDS = 180
"""For one model; what takes longer is reported so."""

CLASSES = 10

TOLERANCE = 1e-3
"""What two ways of computing the same may differ by, relative to the largest output of these untrained nets."""


class Model(NamedTuple):
    """A row of the table: timm's name, the family, the side of the images, and arguments for the factory."""

    name: str
    family: str
    size: int = 64
    args: Mapping[str, Any] = MappingProxyType({})


MODELS = (
    Model("resnet18", "residual"),
    Model("resnext50_32x4d", "residual, grouped"),
    Model("regnetx_002", "residual, grouped"),
    Model("densenet121", "concatenating"),
    Model("vgg11_bn", "plain", 224),
    Model("repvgg_a0", "reparametrized"),
    Model("inception_v3", "branching", 96),
    Model("dla46_c", "aggregating"),
    Model("mobilenetv2_100", "inverted residual"),
    Model("mobilenetv3_small_100", "inverted residual"),
    Model("efficientnet_b0", "inverted residual"),
    Model("mnasnet_small", "inverted residual"),
    Model("hardcorenas_a", "searched"),
    Model("ghostnet_100", "ghost features"),
    Model("convnext_atto", "convolutional, layer norm"),
    Model("poolformer_s12", "metaformer"),
    Model("mixer_s32_224", "MLP on tokens", 128, {"img_size": 128}),
    Model("vit_tiny_patch16_224", "transformer", 64, {"img_size": 64}),
    Model("deit_tiny_distilled_patch16_224", "transformer", 64, {"img_size": 64}),
    Model(
        "swin_tiny_patch4_window7_224",
        "shifted windows, two stages",
        112,
        {"img_size": 112, "depths": (2, 2), "num_heads": (3, 6)},
    ),
    Model("levit_128s", "convolutions, then attention", 64, {"img_size": 64}),
    Model("edgenext_xx_small", "convolutions and attention"),
)

_REASONS = (
    ("it is the output layer", "output"),
    ("too narrow", "narrow"),
    ("grouped convolution", "grouped convolution"),
    ("normalises in groups", "group norm"),
    ("treat its channels alike", "order of channels matters"),
    ("something else than with those silenced", "heads or groups not alone"),
    ("isn't reached", "not reached"),
    ("pruned together", "clashes with another group"),
    ("can't be cut", "passes a module that can't be cut"),
    ("can't be matched", "channels that can't be matched"),
    ("go together with others", "gated or split"),
    ("its heads, which", "heads"),
)
"""What a reason of the analysis says, and how the table says it."""


def main() -> None:
    """Print a table, a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these models alone")
    parser.add_argument("--output", type=Path, help="write everything as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(
            "\n" + json.dumps(examine(next(model for model in MODELS if model.name == options.one))) + "\n"
        )
        return
    found: dict[str, Any] = {"machine": machine(), "models": {}}
    for model in MODELS:
        if model.name in (options.only or [model.name]):
            found["models"][model.name] = row = _in_a_process(model)
            progress(f"{model.name}: {row.get('error') or row['seconds']}")
            save(options.output, found)
    report(found["models"])


def _in_a_process(model: Model) -> dict[str, Any]:
    """A model's row, or why there is none: what crashes, or hangs, mustn't take the others with it."""
    command = [sys.executable, __file__, "--one", model.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {LIMIT_SECONDS} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["it died without a word"]
    return dict(json.loads(lines[-1])) if done.returncode == 0 else {"error": lines[-1][:120]}


def report(rows: dict[str, dict[str, Any]]) -> None:
    """Print the tables."""
    known = {model.name: model for model in MODELS}
    table(
        ("model", "kind", "image", "groups", "layers", "frozen, and why"),
        (
            (
                f"`{name}`",
                known[name].family,
                known[name].size,
                row.get("groups", "-"),
                row.get("layers", "-"),
                row.get("error") or _counted(row["frozen"]),
            )
            for name, row in rows.items()
        ),
    )
    head = (
        "model",
        "params, M",
        "left",
        "MACs, M",
        "left",
        "half",
        "backward",
        "dead channels",
        "OpenVINO",
        "analysis, s",
    )
    table(head, ((f"`{name}`", *_cut(row)) for name, row in rows.items() if "error" not in row))


def _counted(frozen: dict[str, int]) -> str:
    return (
        "; ".join(f"{count} {reason}" for reason, count in sorted(frozen.items(), key=lambda item: -item[1])) or "none"
    )


def _cut(row: dict[str, Any]) -> Iterable[str]:
    before, after = row["before"], row["after"]
    for dense, left in zip(before, after or [None, None], strict=True):
        yield f"{dense / 1e6:.2f}"
        yield "-" if left is None else f"{left / dense:.0%}"
    yield from (row[key] for key in ("half", "backward", "dead", "artifact"))
    yield f"{row['seconds']:.1f}"


def examine(model: Model) -> dict[str, Any]:
    """Everything that is known of a model."""
    torch.set_num_threads(1)
    declare_operators()
    dense, images = build(model), torch.randn(4, 3, model.size, model.size)
    example = images[:2]

    def forward(module: nn.Module) -> Tensor:
        outputs: Tensor = module(example)
        return outputs

    start = time.perf_counter()
    analysis = analyse(dense, forward)
    seconds = time.perf_counter() - start
    kept = {group.name: half(group) for group in analysis.groups}
    ratios = {group.name: ratio_of(kept[group.name], group.channels) for group in analysis.groups}
    plan = CompressionPlan(prune=Pruning(ratios=ratios))
    channels = {group.name: group.channels for group in analysis.groups}
    batch = Batch(torch.arange(4), images, torch.arange(4))
    context = Context(example, channels, Classification(), [batch])
    row: dict[str, Any] = {
        "groups": len(analysis.groups),
        "layers": len(analysis.layers),
        "frozen": Counter(shortened(entry.reason) for entry in analysis.frozen),
        "reasons": {entry.layer: entry.reason for entry in analysis.frozen},
        "before": (analysis.params, analysis.macs),
        "after": None,
        "seconds": seconds,
    }
    cut: list[nn.Module] = []

    def cut_to_half() -> str:
        pruned = compress_structure(copy_of(dense), plan, context)
        row["after"] = sum(parameter.numel() for parameter in pruned.parameters()), count_macs(pruned, forward)[0]
        assert forward(pruned).shape == forward(dense).shape, "the output has another shape"
        cut.append(pruned)
        return widths_as_planned(dense, pruned, analysis, kept)

    row["half"] = attempt(cut_to_half)
    row["backward"] = attempt(lambda: backward(copy_of(cut[0]), images)) if cut else "-"
    row["dead"] = attempt(lambda: dead_channels(dense, analysis, kept, forward))
    row["artifact"] = attempt(lambda: artifact(cut[0], context, images[:3])) if cut else "-"
    return row


def attempt(trial: Callable[[], str]) -> str:
    """What a trial says, or the error that ended it: a table has room for it, and the other trials go on."""
    try:
        return trial()
    except Exception as error:
        lines = str(error).strip().splitlines()
        return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def declare_operators() -> None:
    """Let torchvision be imported without its compiled operators, which its wheels have for one build of torch alone.

    timm needs only torchvision's Python part, which registers shapes for these two operators as it is imported.
    """
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@torch.no_grad()
def build(model: Model) -> nn.Module:
    """A model with random weights, and nothing left at the constants of an untrained one.

    Fresh norms, biases and layer scales are alike for all channels, or so small that a block hardly counts: what mixes
    channels up would pass unseen.
    """
    torch.manual_seed(0)
    args = {"pretrained": False, "num_classes": CLASSES, **model.args}
    built = ModelSource(f"timm:{model.name}", args).build()
    for name, parameter in built.named_parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            is_bias = "bias" in name.rpartition(".")[2]
            parameter.copy_(torch.randn_like(parameter) * 0.1 if is_bias else torch.rand_like(parameter) + 0.5)
    norms = [module for module in built.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of one batch
    built.train()(torch.randn(8, 3, model.size, model.size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return built.eval()


def half(group: Group) -> int:
    """The count of the group's grid nearest to half of its channels."""
    return min(channel_grid(group.channels, unit=group.unit), key=lambda count: abs(count - group.channels / 2))


def shortened(reason: str) -> str:
    """A reason of the analysis as the table has it."""
    for said, short in _REASONS:
        if said in reason:
            return short
    if found := re.search(r"(pruning it breaks|can't be built:) `(.*)` \((\S+);", reason):
        return f"{'breaks' if 'breaks' in found[1] else 'untraceable:'} `{found[2][:40]}` ({found[3]})"
    return re.sub(r"\d+", "N", reason)[:80]


def widths_as_planned(dense: nn.Module, pruned: nn.Module, analysis: Analysis, kept: dict[str, int]) -> str:
    """Whether every layer of every group has as many outputs as the plan says."""
    wrong = []
    for group in analysis.groups:
        for name in group.layers:
            before, after = dense.get_submodule(name), pruned.get_submodule(name)
            # Of an attention's fused layer a channel of the group is three outputs; of other layers it is one.
            if isinstance(before, PRUNABLE) and outputs(after) * group.channels != outputs(before) * kept[group.name]:
                wrong.append(name)
    return f"{len(wrong)} layers of another width: {', '.join(wrong[:3])}" if wrong else "yes"


def outputs(layer: Any) -> int:
    """Output channels or features."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def backward(model: nn.Module, images: Tensor) -> str:
    """Whether a step of training gives finite gradients."""
    loss = nn.functional.cross_entropy(model.train()(images), torch.arange(len(images)))
    torch.autograd.backward(loss)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return "yes" if gradients and all(bool(gradient.isfinite().all()) for gradient in gradients) else "not finite"


@torch.no_grad()
def dead_channels(
    model: nn.Module, analysis: Analysis, kept: dict[str, int], forward: Callable[[nn.Module], Tensor]
) -> str:
    """Whether a model computes the same without channels that were zero before; how many groups could be tried.

    Nothing of the dependency graph is trusted here but the names of the layers: their last outputs are set to zero, and
    the last channels are removed. Not tried are groups that go in units, and, where norms take the mean over channels
    (which zeros change, too), groups of more than one layer.
    """
    model = copy_of(model)
    over_channels = any("LayerNorm" in type(m).__name__ or isinstance(m, nn.GroupNorm) for m in model.modules())
    tried = [
        group
        for group in analysis.groups
        if group.unit == 1
        and (len(group.layers) == 1 or not over_channels)
        and all(outputs(model.get_submodule(name)) == group.channels for name in group.layers)
    ]
    for norm in (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)):
        for tensor in (norm.running_mean, norm.bias):
            if tensor is not None:
                tensor.zero_()  # so that zero stays zero
    for group in tried:
        for layer in (model.get_submodule(name) for name in group.layers):
            _kill(layer, kept[group.name])
    differing = _differing(model, tried, kept, forward)
    same = f"{len(tried) - len(differing)} of {len(tried)}"
    return same + (f", not {', '.join(differing[:3])}" if differing else "")


def _kill(layer: Any, kept: int) -> None:
    """Set all outputs beyond the first `kept` to zero."""
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    (layer.weight.transpose(0, 1) if transposed else layer.weight)[kept:] = 0
    if layer.bias is not None:
        layer.bias[kept:] = 0


def _differing(
    model: nn.Module, groups: Sequence[Group], kept: dict[str, int], forward: Callable[[nn.Module], Tensor]
) -> list[str]:
    """Names of the groups without whose dead channels the model computes something else."""
    if not groups:
        return []
    cut = copy_of(model)
    prune(cut, forward, {group.name: kept[group.name] for group in groups})
    expected, found = forward(model), forward(cut)
    if torch.allclose(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max())):
        return []
    if len(groups) == 1:
        return [groups[0].name]
    middle = len(groups) // 2
    return _differing(model, groups[:middle], kept, forward) + _differing(model, groups[middle:], kept, forward)


@torch.no_grad()
def artifact(model: nn.Module, context: Context, images: Tensor) -> str:
    """The largest difference between the artifact and the model, relative to the largest output."""
    module = compress_numerics(model, CompressionPlan(), context)
    runtime = get_runtime("openvino")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        runtime.deploy(module, context.example, path)
        found = runtime.load(path, LoadOptions(len(images), purpose="score")).run({"input": images.numpy()})
    expected = model.eval()(images)
    difference = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max())
    return f"{difference:.0e}" if difference <= TOLERANCE else f"no, differs by {difference:.0e}"


if __name__ == "__main__":
    main()
