"""What a plan is worth: compress, fine-tune, deploy, measure the artifact."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from paretune.errors import TrialError
from paretune.objectives.artifact import MODEL, replace_folder, save_artifact
from paretune.objectives.baseline import Baseline
from paretune.objectives.compress import compress_numerics, compress_structure, freeze_quantizers
from paretune.objectives.data.splits import Batch
from paretune.objectives.device import Device
from paretune.objectives.finetune import Teacher, Training, fit
from paretune.objectives.latency import Latency, Protocol, measure_paired
from paretune.objectives.measurement import Measurement, Record
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import LoadOptions, Session, get_runtime
from paretune.objectives.scoring import artifact_outputs
from paretune.objectives.verify import Verified, verify
from paretune.spaces.analysis import count_macs
from paretune.spaces.plan import CompressionPlan

EARLY = Protocol(warmup_seconds=0.05, min_calls=30, max_calls=30)
"""Latency before the training: enough to know where a plan stands, and quick."""

_DRIFT = 0.1
"""A baseline slower or faster than at first by more than this share says that the machine isn't itself."""


class Stopwatch:
    """Adds up the seconds of named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class _Trial:
    """One evaluation under way.

    Attributes:
        plan: What to do.
        seed: Of its randomness.
        epochs: Of the fine-tuning.
        float_bits: Width of all that isn't quantized.
        folder: Where the artifact grows.
        watch: Where its time goes.
    """

    plan: CompressionPlan
    seed: int
    epochs: float
    float_bits: int
    folder: Path
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def path(self) -> Path:
        """The model file."""
        return self.folder / MODEL


class Evaluator:
    """Evaluates plans one after the other; one for each worker process.

    Args:
        problem: Model, data, task, target.
        baseline: The dense model's artifact, already measured.
        layers: Names of the layers whose executed width the runtime reports.
    """

    def __init__(self, problem: Problem, baseline: Baseline, layers: list[str]) -> None:
        self._problem = problem
        self._baseline = baseline
        self._layers = layers
        self._runtime = get_runtime(problem.target.runtime)
        self._device = Device(problem.target.device)

    @cached_property
    def _teacher(self) -> Teacher:
        source = self._problem.teacher or self._problem.model
        splits = self._problem.splits
        return Teacher(source.build(), len(splits.train), cached=splits.augment is None)

    @cached_property
    def _baseline_session(self) -> Session:
        return self._baseline.session()

    @cached_property
    def _calibration(self) -> list[Batch]:
        options = self._problem.training
        batches = self._problem.splits.train.batches(options.batch_size, shuffle_seed=0)
        return [batch for batch, _ in zip(batches, range(options.calibration_batches), strict=False)]

    def evaluate(self, plan: CompressionPlan, folder: Path, *, seed: int, epochs: float | None = None) -> Record:
        """Compress, fine-tune, deploy and measure; the artifact goes to `folder`.

        Equal plans, seeds and epochs give equal weights on the same machine with one thread.

        Args:
            plan: What to do.
            folder: Is made, or replaced; nothing changes there if the trial fails.
            seed: Of the training batches, dropout and random importance.
            epochs: Of the fine-tuning; the job's own where None.

        Raises:
            TrialError: The loss isn't finite, or a layer runs in another width than the plan asks for.
        """
        torch.manual_seed(seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as made, self._device.shared():
            work = Path(made) / "artifact"
            work.mkdir()
            epochs = self._problem.training.epochs if epochs is None else epochs
            trial = _Trial(plan, seed, epochs, self._float_bits(plan), work)
            model, params, macs = self._compress(trial)
            early, early_size = self._measure_early(trial, model)
            module = self._finetune(trial, model)
            session, executed = self._deploy(trial, module)
            accuracy = self._score(trial)
            latency, noisy = self._measure(trial, session)
            expected = self._baseline.measurement.latency_ms
            measurement = Measurement(
                accuracy=accuracy,
                # By the paired speed-up: the machine drifts between trials, and the baseline drifts with it.
                latency_ms=expected / latency.speedup,
                latency_low_ms=expected / latency.speedup_high,
                latency_high_ms=expected / latency.speedup_low,
                speedup=latency.speedup,
                size_bytes=trial.path.stat().st_size,
                params=params,
                macs=macs,
            )
            if not measurement.is_finite():
                raise TrialError(f"all measured values must be finite, but got {measurement}; check task and model")
            with trial.watch.phase("save"):
                save_artifact(
                    work,
                    module,
                    plan,
                    session,
                    self._problem,
                    float_bits=trial.float_bits,
                    validation=measurement,
                )
                replace_folder(work, folder)
        return Record(measurement, expected / early.speedup, early_size, executed, latency, trial.watch.seconds, noisy)

    def verify(self, folders: Sequence[Path], *, rounds: int) -> list[Verified]:
        """Measure artifacts together and score them on validation and test; see `paretune.objectives.verify`."""
        return verify(self._problem, self._baseline.folder, folders, rounds=rounds)

    def _float_bits(self, plan: CompressionPlan) -> int:
        floats = {bits for bits in plan.quantize.bits.values() if bits > 8}
        if len(floats) > 1:
            raise TrialError(
                f"all unquantized layers of an artifact must share one float format, but the plan asks for "
                f"{sorted(floats)}; give each layer 8 bits or the same float width"
            )
        return floats.pop() if floats else self._baseline.float_bits

    def _compress(self, trial: _Trial) -> tuple[nn.Module, int, int]:
        """The pruned model, its parameters and its MACs."""
        with trial.watch.phase("compress"):
            context = self._problem.context(self._calibration)
            model = compress_structure(self._problem.model.build(), trial.plan, context)
            macs, _ = count_macs(model.eval(), self._problem.forward)
            return model, sum(parameter.numel() for parameter in model.parameters()), macs

    def _measure_early(self, trial: _Trial, model: nn.Module) -> tuple[Latency, int]:
        """Latency and size of the untrained artifact: they depend on the plan, not on the weights."""
        with trial.watch.phase("compress"):
            context = self._problem.context(self._calibration[:1])
            module = compress_numerics(model, trial.plan, context)
        session, _ = self._deploy(trial, module)
        with self._device.exclusive(), trial.watch.phase("measure"):
            latency = self._clock(session, EARLY)
        return latency, trial.path.stat().st_size

    def _finetune(self, trial: _Trial, model: nn.Module) -> nn.Module:
        """Train in floats, then through the quantizers; returns the module to deploy."""
        problem, config = self._problem, trial.plan.finetune
        with trial.watch.phase("train"):
            teacher = self._teacher if config.distillation_weight > 0 else None
            training = Training(problem.splits, problem.task, problem.training, teacher, self._device.step_aside)
            total = training.steps(trial.epochs)
            quantizes = any(bits <= 8 for bits in trial.plan.quantize.bits.values())
            border = total - (round(problem.training.quantized_share * total) if quantizes else 0)
            batches = training.batches(trial.seed)
            fit(model, training, config, batches, range(border), total)
            module = compress_numerics(model, trial.plan, problem.context(self._calibration))
            fit(module, training, config, batches, range(border, total), total)
            freeze_quantizers(module)
        return module

    def _deploy(self, trial: _Trial, module: nn.Module) -> tuple[Session, dict[str, int]]:
        """Write and load the model file, and see that each layer runs as the plan asks."""
        with trial.watch.phase("deploy"):
            self._runtime.deploy(module, self._problem.example, trial.path)
            target = self._problem.target
            options = LoadOptions(target.batch_size, target.threads, trial.float_bits)
            session = self._runtime.load(trial.path, options)
            reports = session.layers()
        executed = {name: reports[name].bits for name in self._layers if name in reports}
        for name in self._layers:
            asked = trial.plan.quantize.bits.get(name, trial.float_bits)
            if executed.get(name) != asked:
                found = f"runs in {executed[name]}" if name in executed else "isn't found in the compiled model"
                raise TrialError(
                    f"every layer must run in the width that the plan asks for, but {name} was to run in {asked} bits "
                    f"and {found}; exclude it (space.exclude) or fix space.bits"
                )
        return session, executed

    def _score(self, trial: _Trial) -> float:
        with trial.watch.phase("score"):
            options = LoadOptions(1, self._problem.target.threads, trial.float_bits)
            split = self._problem.splits.validation
            scored = artifact_outputs(self._runtime, trial.path, options, split, between=self._device.step_aside)
            return self._problem.task.metric(*scored)

    def _measure(self, trial: _Trial, session: Session) -> tuple[Latency, bool]:
        """Latency paired with the baseline, and whether the machine was off even the second time."""
        expected = self._baseline.measurement.latency_ms
        with self._device.exclusive(), trial.watch.phase("measure"):
            latency = self._clock(session, Protocol())
            if abs(latency.baseline_ms / expected - 1) > _DRIFT:
                latency = self._clock(session, Protocol())
        return latency, abs(latency.baseline_ms / expected - 1) > _DRIFT

    def _clock(self, session: Session, protocol: Protocol) -> Latency:
        batch = self._problem.batch()
        return measure_paired(session.bind(batch), self._baseline_session.bind(batch), protocol)
