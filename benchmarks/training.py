"""What our fine-tuning loop costs: its step rate against that of a bare PyTorch loop.

    python benchmarks/training.py [--nets NET,...] [--device cuda] [--precision float32] [--batch 128] [--output FILE]

Both train the same net on the same samples, with the same optimizer, autocast and memory format, and without
distillation. The bare loop does what nobody can leave out: pick a batch, forward, backward, optimizer. Ours also
follows a schedule, clips gradients and watches the loss. Blocks of steps take turns, so that both see the same machine;
a ratio is ours to bare within a pair of blocks. Wanted: 0.90 or more.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from nets import CLASSES, build, images
from reporting import machine, progress, save, table
from torch import nn

from paretune.objectives.accelerator import float_format, training_device, use_tf32
from paretune.objectives.data import Split, Splits
from paretune.objectives.data.residency import make_resident
from paretune.objectives.data.splits import Batch
from paretune.objectives.finetune import Training, TrainingReport, TrainOptions, fit
from paretune.objectives.tasks import Classification
from paretune.spaces.plan import Finetuning

WANTED = 0.90
_BATCHES = 8
"""Of the data; the loops go round them."""


def plain() -> nn.Module:
    """Three convolutions with batch norm, for the images of `nets`; steps so short that the loop itself shows."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES))


NETS: dict[str, Callable[[], nn.Module]] = {"resnet20": lambda: build("resnet20"), "plain": plain}


@dataclass(frozen=True)
class Row:
    """Steps a second, block by block, of one net.

    Attributes:
        net: Its name.
        report: What our loop ran on.
        ours: Of `fit`.
        bare: Of the bare loop, in the block that followed.
    """

    net: str
    report: TrainingReport
    ours: list[float]
    bare: list[float]

    @property
    def ratios(self) -> list[float]:
        """Ours to bare, a pair of blocks each."""
        return [ours / bare for ours, bare in zip(self.ours, self.bare, strict=True)]


class Bare:
    """The bare loop, to be called for so many steps at a time."""

    def __init__(self, model: nn.Module, split: Split, options: TrainOptions, *, channels_last: bool) -> None:
        device = training_device(options.device)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self._model = model.to(device=device, memory_format=layout).train()  # type: ignore[call-overload]
        self._optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=options.weight_decay, fused=True)
        self._inputs, self._targets = split.inputs, split.targets
        self._batch_size = options.batch_size
        self._dtype = float_format(options.precision, device)
        self._device = device
        self._layout = layout

    def __call__(self, steps: int) -> None:
        assert isinstance(self._inputs, torch.Tensor)
        for _ in range(steps):
            chosen = torch.randint(len(self._targets), (self._batch_size,), device=self._targets.device)
            inputs = self._inputs[chosen].to(self._device).contiguous(memory_format=self._layout)
            targets = self._targets[chosen].to(self._device)
            self._optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not torch.float32):
                outputs = self._model(inputs)
            F.cross_entropy(outputs.float(), targets).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Turns:
    """Lets the bare loop run a block after each block of `fit`, which calls this when the device has nothing to do."""

    def __init__(self, bare: Bare, block: int) -> None:
        self._bare = bare
        self._block = block
        self._steps = 0
        self._since = time.perf_counter()
        self.ours: list[float] = []
        self.bare: list[float] = []

    def counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, counted as they are taken."""
        for batch in batches:
            self._steps += 1
            yield batch

    def __call__(self) -> None:
        if self._steps < self._block:
            return
        self.ours.append(self._steps / (time.perf_counter() - self._since))
        start = time.perf_counter()
        self._bare(self._steps)
        self.bare.append(self._steps / (time.perf_counter() - start))
        self._steps = 0
        self._since = time.perf_counter()


def measure(net: str, options: TrainOptions, *, block: int, blocks: int) -> Row:
    """Train a net in turns; the first pair of blocks warms up and is left out."""
    samples = images(_BATCHES * options.batch_size, seed=0)
    targets = torch.arange(len(samples)) % CLASSES
    device = training_device(options.device)
    split = make_resident(Split(samples, targets), device)
    turns: Turns | None = None
    training = Training(
        Splits(split, split, split), Classification(), options, after_step=lambda _: turns() if turns else None
    )
    # A first step tells the memory format.
    first = fit(NETS[net](), training, Finetuning(), training.batches(0), range(1), 1)
    turns = Turns(Bare(NETS[net](), split, options, channels_last=first.channels_last), block)
    steps = block * (blocks + 1)
    with use_tf32(device, options.tf32):
        report = fit(NETS[net](), training, Finetuning(), turns.counted(training.batches(0)), range(steps), steps)
    return Row(net, report, turns.ours[1:], turns.bare[1:])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default=",".join(NETS), help=f"some of {', '.join(NETS)}")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--batch", type=int, default=128, help="samples a step")
    parser.add_argument("--block", type=int, default=20, help="steps a block; on a GPU a multiple of 20")
    parser.add_argument("--blocks", type=int, default=15, help="pairs of blocks")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--output", type=Path, help="also write the numbers as JSON")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = machine()
    options = TrainOptions(batch_size=given.batch, device=given.device, precision=given.precision)
    rows = []
    for net in given.nets.split(","):
        progress(f"{net}: {given.blocks} pairs of {given.block} steps")
        rows.append(measure(net, options, block=given.block, blocks=given.blocks))
        save(given.output, {"machine": found, "rows": [asdict(row) for row in rows]})
    table(
        ("net", "device", "precision", "channels last", "ours, steps/s", "bare, steps/s", "ours / bare", "from", "to"),
        [
            (
                row.net,
                row.report.device,
                row.report.precision,
                row.report.channels_last,
                *(f"{statistics.median(rates):.2f}" for rates in (row.ours, row.bare, row.ratios)),
                f"{min(row.ratios):.2f}",
                f"{max(row.ratios):.2f}",
            )
            for row in rows
        ],
    )
    slow = [row.net for row in rows if statistics.median(row.ratios) < WANTED]
    print(f"wanted: {WANTED:.2f}; below it: {', '.join(slow) or 'none'}")


if __name__ == "__main__":
    main()
