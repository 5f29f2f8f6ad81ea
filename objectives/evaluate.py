"""What a plan is worth: compress, fine-tune, deploy, measure the artifact."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn

from paretune.errors import TrialError
from paretune.objectives.accelerator import release_memory, training_device
from paretune.objectives.artifact import replace_folder, save_artifact
from paretune.objectives.baseline import Baseline
from paretune.objectives.compress import compress_numerics, compress_structure, resolve_plan
from paretune.objectives.course import train
from paretune.objectives.data.residency import make_resident
from paretune.objectives.data.splits import Batch, Splits
from paretune.objectives.device import is_cuda
from paretune.objectives.distillation import Ensemble, Hints, Teacher
from paretune.objectives.finetune import Training, TrainingReport
from paretune.objectives.latency import Latency, Protocol, measure_paired
from paretune.objectives.measurement import Deployment, Measurement, OnTarget, Record
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import Session
from paretune.objectives.scoring import artifact_outputs
from paretune.objectives.site import Site, check_executed
from paretune.objectives.verify import Verified, verify
from paretune.spaces.analysis import count_macs
from paretune.spaces.graph import execution_order
from paretune.spaces.plan import CompressionPlan

EARLY = Protocol(warmup_seconds=0.05, min_calls=30, max_calls=30)
"""Latency before the training: enough to know where a plan stands, and quick."""

DRIFT = 0.1
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
        problem: Whose model is compressed: the job's, or one with a variant in its place.
        plan: What to do, resolved.
        seed: Of its randomness.
        epochs: Of the fine-tuning.
        float_bits: Target's name to the width of all that isn't quantized.
        folder: Where the artifact grows.
        watch: Where its time goes.
    """

    problem: Problem
    plan: CompressionPlan
    seed: int
    epochs: float
    float_bits: dict[str, int]
    folder: Path
    watch: Stopwatch = field(default_factory=Stopwatch)


class _Built(NamedTuple):
    """An artifact on one target: loaded to be measured, with the widths that were read back."""

    session: Session
    executed: dict[str, int]


class Evaluator:
    """Evaluates plans one after the other; one for each worker process.

    Args:
        problem: Model, data, task, targets.
        baseline: The dense model's artifact, already measured.
    """

    def __init__(self, problem: Problem, baseline: Baseline) -> None:
        self._problem = problem
        self._baseline = baseline
        self._device = problem.device()

    @cached_property
    def _teacher(self) -> Teacher:
        problem, splits = self._problem, self._problem.splits
        cached = splits.augment is None and not problem.training.augment
        return Teacher(Ensemble(self._teachers, problem.task.ensemble), len(splits.train), cached=cached)

    @cached_property
    def _teachers(self) -> list[nn.Module]:
        return [source.build() for source in self._problem.teachers or (self._problem.model,)]

    @cached_property
    def _hints(self) -> Hints | None:
        layers = self._problem.training.hints
        return Hints(self._teachers[0], layers) if layers else None

    @cached_property
    def _training_splits(self) -> Splits:
        """The splits, the training data on the GPU where one trains and they fit."""
        splits = self._problem.splits
        device = training_device(self._problem.training.device)
        return replace(splits, train=make_resident(splits.train, device))

    @cached_property
    def _baseline_sessions(self) -> dict[str, Session]:
        return {name: self._baseline.session(name) for name in self._problem.sites}

    @cached_property
    def _layers(self) -> dict[str, list[str]]:
        """Target's name to the layers whose width its runtime reports, as seen on the dense model."""
        order = execution_order(self._problem.model.build(), self._problem.forward)
        reported = {name: session.layers() for name, session in self._baseline_sessions.items()}
        return {name: [layer for layer in order if layer in known] for name, known in reported.items()}

    @cached_property
    def _calibration(self) -> list[Batch]:
        options = self._problem.training
        batches = self._problem.splits.train.batches(options.batch_size, shuffle_seed=0)
        return [batch for batch, _ in zip(batches, range(options.calibration_batches), strict=False)]

    def evaluate(self, plan: CompressionPlan, folder: Path, *, seed: int, epochs: float | None = None) -> Record:
        """Compress, fine-tune, deploy and measure; the artifact goes to `folder`.

        Equal plans, seeds and epochs give equal weights on the same machine where one thread of a CPU trains.

        Args:
            plan: What to do.
            folder: Is made, or replaced; nothing changes there if the trial fails.
            seed: Of the training batches, dropout and random importance.
            epochs: Of the fine-tuning; the job's own where None, none at all where 0.

        Raises:
            TrialError: The loss isn't finite, or a layer runs in another width than the plan asks for.
        """
        torch.manual_seed(seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as made, self._device.shared():
            work = Path(made) / "artifact"
            work.mkdir()
            self._load_baselines()
            trial = self._begin(plan, seed, epochs, work)
            model, params, macs = self._compress(trial)
            early = self._measure_early(trial, model)
            module, training = self._finetune(trial, model)
            built = self._deploy(trial, module)
            found = {
                name: self._on(trial, site, built[name], early[name]) for name, site in self._problem.sites.items()
            }
            measurement = Measurement({name: on for name, (on, _) in found.items()}, params, macs)
            if not measurement.is_finite():
                raise TrialError(f"all measured values must be finite, but got {measurement}; check task and model")
            with trial.watch.phase("save"):
                save_artifact(
                    work,
                    module,
                    trial.plan,
                    {name: entry.session for name, entry in built.items()},
                    self._problem,
                    float_bits=trial.float_bits,
                    validation=measurement,
                )
                replace_folder(work, folder)
        deployments = {name: deployment for name, (_, deployment) in found.items()}
        return Record(measurement, deployments, trial.watch.seconds, asdict(training))

    def outline(self, plan: CompressionPlan, *, seed: int) -> dict[str, float]:
        """What is known of a plan without training: latencies with their upper ends, sizes, params and macs.

        They are named as in a measurement: ``latency_ms``, ``latency_high_ms@NAME`` and so on.

        Raises:
            TrialError: A layer runs in another width than the plan asks for.
        """
        torch.manual_seed(seed)
        with TemporaryDirectory(prefix="paretune-outline-") as made, self._device.shared():
            self._load_baselines()
            trial = self._begin(plan, seed, 0, Path(made))
            model, params, macs = self._compress(trial)
            early = self._measure_early(trial, model, Protocol())
        found: dict[str, float] = {"params": params, "macs": macs}
        for name, (latency, size) in early.items():
            suffix, (middle, _, high, _) = f"@{name}" if name else "", self._by_speedup(name, latency)
            found |= {f"latency_ms{suffix}": middle, f"latency_high_ms{suffix}": high, f"size_bytes{suffix}": size}
        return found

    def verify(self, folders: Sequence[Path], *, rounds: int) -> list[Verified]:
        """Measure artifacts together and score them on validation and test; see `paretune.objectives.verify`."""
        return verify(self._problem, self._baseline.folder, folders, rounds=rounds)

    def _begin(self, plan: CompressionPlan, seed: int, epochs: float | None, folder: Path) -> _Trial:
        problem = self._problem.of(plan.variant)
        watch = Stopwatch()
        if not plan.is_resolved:
            with watch.phase("compress"):
                context = replace(problem.context(self._calibration), grids=problem.grids, exclude=problem.exclude)
                plan = resolve_plan(problem.model.build(), plan, context)
        epochs = problem.training.epochs if epochs is None else epochs
        return _Trial(problem, plan, seed, epochs, self._float_bits(plan), folder, watch)

    def _float_bits(self, plan: CompressionPlan) -> dict[str, int]:
        """The plan's float width on the first target; it stands for the best float format of each other one."""
        floats = {bits for bits in plan.quantize.bits.values() if bits > 8}
        if len(floats) > 1:
            raise TrialError(
                f"all unquantized layers of an artifact must share one float format, but the plan asks for "
                f"{sorted(floats)}; give each layer 8 bits or the same float width"
            )
        return self._baseline.float_bits | ({"": floats.pop()} if floats else {})

    def _compress(self, trial: _Trial) -> tuple[nn.Module, int, int]:
        """The pruned model, its parameters and its MACs."""
        with trial.watch.phase("compress"):
            context = trial.problem.context(self._calibration)
            model = compress_structure(trial.problem.model.build(), trial.plan, context)
            macs, _ = count_macs(model.eval(), trial.problem.forward)
            return model, sum(parameter.numel() for parameter in model.parameters()), macs

    def _measure_early(
        self, trial: _Trial, model: nn.Module, protocol: Protocol = EARLY
    ) -> dict[str, tuple[Latency, int]]:
        """Latency and size of the untrained artifact on each target: they depend on the plan, not on the weights."""
        with trial.watch.phase("compress"):
            context = trial.problem.context(self._calibration[:1])
            module = compress_numerics(model, trial.plan, context)
        built = self._deploy(trial, module)
        found = {}
        for name, site in self._problem.sites.items():
            with self._device.exclusive(), trial.watch.phase("measure"):
                latency = self._clock(site, built[name].session, protocol)
            found[name] = latency, site.size(trial.folder)
        return found

    def _finetune(self, trial: _Trial, model: nn.Module) -> tuple[nn.Module, TrainingReport]:
        """Train what was compressed; returns the module to deploy, on the CPU."""
        problem, plan = trial.problem, trial.plan
        with trial.watch.phase("train"):
            teacher = self._teacher if plan.finetune.distillation_weight > 0 else None
            hints = self._hints if plan.finetune.hint_weight > 0 else None
            training = Training(
                self._training_splits, problem.task, problem.training, teacher, self._device.step_aside, hints
            )
            context = problem.context(self._calibration)
            first = plan.schedule.fractions[0]
            if first < 1:  # what was compressed wholly, for the early measurement, went too far
                model = compress_structure(problem.model.build(), plan, context, first)
            module, report = train(model, plan, training, context, seed=trial.seed, epochs=trial.epochs)
            release_memory()  # the runtime that measures, and other workers, may need it
        return module, report

    def _deploy(self, trial: _Trial, module: nn.Module) -> dict[str, _Built]:
        """Write and load the model files, and see that each layer runs as the plan asks."""
        found: dict[str, _Built] = {}
        with trial.watch.phase("deploy"):
            for site in {site.model: site for site in self._problem.sites.values()}.values():
                site.runtime.deploy(module, self._problem.example, trial.folder / site.model)
                if trial.plan.is_packable or (self._baseline.folder / site.packed).is_file():
                    site.pack(trial.folder)
            for name, site in self._problem.sites.items():
                float_bits = trial.float_bits[name]
                with self._tuning(site):
                    session = site.load(trial.folder, float_bits)
                reports = session.layers()
                # Which layers of a variant a runtime reports isn't known beforehand.
                known = reports if trial.plan.variant else self._layers[name]
                found[name] = _Built(session, check_executed(reports, module, float_bits, known))
        return found

    def _tuning(self, *sites: Site) -> AbstractContextManager[None]:
        """Alone on the devices while kernels are timed: beside another's training they would be badly chosen."""
        tunes = any(site.runtime.compiles and is_cuda(site.target.device) for site in sites)
        return self._device.exclusive() if tunes else nullcontext()

    def _load_baselines(self) -> None:
        """Load the baseline for every target, once."""
        if "_layers" not in vars(self):
            with self._tuning(*self._problem.sites.values()):
                _ = self._layers

    def _on(self, trial: _Trial, site: Site, built: _Built, early: tuple[Latency, int]) -> tuple[OnTarget, Deployment]:
        """What the artifact is worth on a target, and how that was found out."""
        accuracy = self._score(trial, site)
        latency, noisy, usage = self._measure(trial, site, built.session)
        size = site.size(trial.folder)
        first, early_size = early
        return (
            OnTarget(accuracy, *self._by_speedup(site.name, latency), size, **usage),
            Deployment(self._expected(site.name) / first.speedup, early_size, built.executed, latency, noisy),
        )

    def _score(self, trial: _Trial, site: Site) -> float:
        with trial.watch.phase("score"):
            path, options = trial.folder / site.model, site.options(trial.float_bits[site.name])
            split = self._problem.splits.validation
            scored = artifact_outputs(site.runtime, path, options, split, between=self._device.step_aside)
            return self._problem.task.metric(*scored)

    def _measure(self, trial: _Trial, site: Site, session: Session) -> tuple[Latency, bool, dict[str, Any]]:
        """Latency paired with the baseline, whether the machine was off even the second time, and the usage."""
        expected = self._expected(site.name)

        def is_off(latency: Latency) -> bool:
            return abs(latency.baseline_ms / expected - 1) > DRIFT or bool(latency.throttled)

        with self._device.exclusive(), trial.watch.phase("measure"):
            latency = self._clock(site, session, Protocol())
            if is_off(latency):
                latency = self._clock(site, session, Protocol())
            usage = site.usage(session.bind(self._problem.batch(site.target.batch_size)))
        return latency, is_off(latency), usage

    def _clock(self, site: Site, session: Session, protocol: Protocol) -> Latency:
        batch = self._problem.batch(site.target.batch_size)
        reference = self._baseline_sessions[site.name].bind(batch)
        return measure_paired(session.bind(batch), reference, protocol, site.clock)

    def _expected(self, name: str) -> float:
        return self._baseline.measurement.on[name].latency_ms

    def _by_speedup(self, name: str, latency: Latency) -> tuple[float, float, float, float]:
        """Latency, its interval and the speed-up: the machine drifts between trials, and the baseline with it."""
        expected = self._expected(name)
        return (
            expected / latency.speedup,
            expected / latency.speedup_high,
            expected / latency.speedup_low,
            latency.speedup,
        )
