"""What a plan is worth: compress, fine-tune, deploy, measure the artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from paretune.errors import TrialError
from paretune.objectives.accelerator import release_memory, training_device
from paretune.objectives.artifact import replace_folder, save_artifact
from paretune.objectives.baseline import Baseline
from paretune.objectives.bench import Bench, Early, LocalBench
from paretune.objectives.checkpoint import Checkpoint
from paretune.objectives.compress import compress_numerics, compress_structure, resolve_plan
from paretune.objectives.course import train
from paretune.objectives.data.residency import make_resident
from paretune.objectives.data.splits import Batch, Splits
from paretune.objectives.distillation import Ensemble, Hints, Teacher
from paretune.objectives.finetune import Training, TrainingReport
from paretune.objectives.latency import Protocol
from paretune.objectives.measurement import Measurement, Record, by_speedup
from paretune.objectives.problem import Problem
from paretune.objectives.progress import Stopped, Watcher, check_rungs
from paretune.objectives.sensitivity import validation_batches
from paretune.objectives.site import Wanted, wanted_widths
from paretune.objectives.stopwatch import Stopwatch
from paretune.objectives.verify import Verified, verify
from paretune.objectives.watching import SAMPLES, Ended, Watching
from paretune.spaces.analysis import count_macs
from paretune.spaces.plan import CompressionPlan

_SCORED, _LEAST_SAMPLES = 1 / 8, 128
"""Samples that a rung is scored on, as a share of those that a whole training sees; and their least number."""

EARLY = Protocol(warmup_seconds=0.05, min_calls=30, max_calls=30)
"""Latency before the training: enough to know where a plan stands, and quick."""


@dataclass(frozen=True)
class _Trial:
    """One evaluation under way.

    Attributes:
        problem: Whose model is compressed: the job's, or one with a variant in its place.
        asked: What to do, as it was given.
        plan: The same, resolved.
        seed: Of its randomness.
        epochs: Of the fine-tuning.
        float_bits: Target's name to the width of all that isn't quantized.
        folder: Where the artifact grows.
        watch: Where its time goes.
        checkpoint: Where it goes on; None begins anew.
    """

    problem: Problem
    asked: CompressionPlan
    plan: CompressionPlan
    seed: int
    epochs: float
    float_bits: dict[str, int]
    folder: Path
    watch: Stopwatch
    checkpoint: Checkpoint | None = None


class Evaluator:
    """Evaluates plans one after the other; one for each worker process.

    Args:
        problem: Model, data, task, targets.
        baseline: The dense model's artifact, already measured.
        bench: Measures artifacts; None does so in this process.
    """

    def __init__(self, problem: Problem, baseline: Baseline, bench: Bench | None = None) -> None:
        self._problem = problem
        self._baseline = baseline
        self._device = problem.device()
        self._bench = bench or LocalBench(problem, baseline, self._device)

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
    def _calibration(self) -> list[Batch]:
        options = self._problem.training
        batches = self._problem.splits.train.batches(options.batch_size, shuffle_seed=0)
        return [batch for batch, _ in zip(batches, range(options.calibration_batches), strict=False)]

    def _samples(self) -> list[Batch]:
        """What a rung is scored on: few samples where the training sees few itself."""
        trained = self._problem.training.epochs * len(self._problem.splits.train)
        return validation_batches(self._problem, min(SAMPLES, max(_LEAST_SAMPLES, round(_SCORED * trained))))

    def evaluate(
        self,
        plan: CompressionPlan,
        folder: Path,
        *,
        seed: int,
        epochs: float | None = None,
        rungs: Sequence[float] = (),
        watcher: Watcher | None = None,
        resume: Path | None = None,
    ) -> Record | Stopped:
        """Compress, fine-tune, deploy and measure; the artifact goes to `folder`.

        Equal plans, seeds and epochs give equal weights on the same machine where one thread of a CPU trains, whatever
        the rungs and whoever watches. Beside an artifact that was trained in floats lies a checkpoint, to resume from.

        Args:
            plan: What to do.
            folder: Is made, or replaced; nothing changes there if the trial fails or is stopped.
            seed: Of the training batches, dropout and random importance.
            epochs: Of the fine-tuning, from its very beginning; the job's own where None, none at all where 0.
            rungs: Shares of the training, ascending in (0, 1), at which the model is scored on validation samples.
            watcher: Is told how it goes, and may end it; None lets it run.
            resume: Artifact of this plan with fewer epochs: its training goes on, as far as `epochs`.

        Returns:
            A `Stopped` if the watcher has ended it.

        Raises:
            JobError: The rungs aren't shares in ascending order.
            TrialError: The loss isn't finite, a layer runs in another width than the plan asks for, or there is nothing
                to resume from.
        """
        check_rungs(rungs)
        watch = Stopwatch()
        metric, step_aside = self._problem.task.metric, self._device.step_aside
        watching = Watching(watcher, rungs, self._samples, metric, watch, step_aside)
        torch.manual_seed(seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as made, self._device.shared():
                work = Path(made) / "artifact"
                work.mkdir()
                trial = self._begin(plan, seed, epochs, work, watch, resume)
                record = self._carry_out(trial, watching)
                replace_folder(work, folder)
                return record
        except Ended:
            pass  # only beyond this block nothing holds on to the model any more
        release_memory()
        return watching.stopped()

    def outline(self, plan: CompressionPlan, *, seed: int, protocol: Protocol = EARLY) -> dict[str, float]:
        """What is known of a plan without training: latencies with their upper ends, sizes, params and macs.

        They are named as in a measurement: ``latency_ms``, ``latency_high_ms@NAME`` and so on.

        Args:
            plan: What to do.
            seed: Of what is random in it.
            protocol: How long latencies are measured; by default as before a training: to a few percent, in a moment.

        Raises:
            TrialError: A layer runs in another width than the plan asks for.
        """
        torch.manual_seed(seed)
        with TemporaryDirectory(prefix="paretune-outline-") as made, self._device.shared():
            trial = self._begin(plan, seed, 0, Path(made), Stopwatch())
            model, params, macs = self._compress(trial)
            early = self._measure_early(trial, model, protocol)
        return self._outline(early, params, macs)

    def _outline(self, early: Mapping[str, Early], params: int, macs: int) -> dict[str, float]:
        """Latencies with their upper ends, and sizes, named as in a measurement."""
        found: dict[str, float] = {"params": params, "macs": macs}
        for name, (latency, size) in early.items():
            suffix, expected = f"@{name}" if name else "", self._baseline.measurement.on[name].latency_ms
            middle, _, high, _ = by_speedup(expected, latency)
            found |= {f"latency_ms{suffix}": middle, f"latency_high_ms{suffix}": high, f"size_bytes{suffix}": size}
        return found

    def verify(self, folders: Sequence[Path], *, rounds: int) -> list[Verified]:
        """Measure artifacts together and score them on validation and test; see `paretune.objectives.verify`."""
        return verify(self._problem, self._baseline.folder, folders, rounds=rounds)

    def _carry_out(self, trial: _Trial, watching: Watching) -> Record:
        """Make the artifact, in the trial's folder.

        Raises:
            Ended: The watcher doesn't want it any more.
        """
        model, params, macs = self._compress(trial)
        early = self._measure_early(trial, model)
        watching.outlined(self._outline(early, params, macs))
        module, training = self._finetune(trial, model, watching)
        wanted = self._deploy(trial, module)
        found = self._bench.final(trial.folder, wanted, early, trial.float_bits, trial.watch)
        measurement = Measurement({name: final.on for name, final in found.items()}, params, macs)
        if not measurement.is_finite():
            raise TrialError(f"all measured values must be finite, but got {measurement}; check task and model")
        with trial.watch.phase("save"):
            save_artifact(
                trial.folder,
                module,
                trial.plan,
                {name: final.loaded for name, final in found.items()},
                self._problem,
                float_bits=trial.float_bits,
                validation=measurement,
            )
        deployments = {name: final.deployment for name, final in found.items()}
        return Record(measurement, deployments, trial.watch.seconds, asdict(training), watching.rungs)

    def _begin(
        self,
        asked: CompressionPlan,
        seed: int,
        epochs: float | None,
        folder: Path,
        watch: Stopwatch,
        resume: Path | None = None,
    ) -> _Trial:
        problem, plan, checkpoint = self._problem.of(asked.variant), asked, None
        epochs = problem.training.epochs if epochs is None else epochs
        if resume is not None:
            checkpoint = Checkpoint.read(resume)
            plan = checkpoint.plan_for(asked, epochs)
        elif not plan.is_resolved:
            with watch.phase("compress"):
                context = replace(problem.context(self._calibration), grids=problem.grids, exclude=problem.exclude)
                plan = resolve_plan(problem.model.build(), plan, context)
        return _Trial(problem, asked, plan, seed, epochs, self._float_bits(plan), folder, watch, checkpoint)

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
        """The pruned model, its parameters and its MACs; with its trained weights where it is resumed."""
        with trial.watch.phase("compress"):
            # What is resumed is replayed without data, as its weights are loaded.
            context = trial.problem.context([] if trial.checkpoint else self._calibration)
            model = compress_structure(trial.problem.model.build(), trial.plan, context)
            if trial.checkpoint:
                trial.checkpoint.load(model)
            macs, _ = count_macs(model.eval(), trial.problem.forward)
            return model, sum(parameter.numel() for parameter in model.parameters()), macs

    def _measure_early(self, trial: _Trial, model: nn.Module, protocol: Protocol = EARLY) -> dict[str, Early]:
        """Latency and size of the untrained artifact on each target: they depend on the plan, not on the weights."""
        with trial.watch.phase("compress"):
            context = trial.problem.context(self._calibration[:1])
            module = compress_numerics(model, trial.plan, context)
        wanted = self._deploy(trial, module)
        return self._bench.early(trial.folder, wanted, trial.float_bits, protocol, trial.watch)

    def _deploy(self, trial: _Trial, module: nn.Module) -> dict[str, dict[str, Wanted]]:
        """Write the model files of all targets; returns how their layers must be executed, by target."""
        sites = self._problem.sites
        with trial.watch.phase("deploy"):
            for site in {site.model: site for site in sites.values()}.values():
                site.runtime.deploy(module, self._problem.example, trial.folder / site.model)
                if trial.plan.is_packable or (self._baseline.folder / site.packed).is_file():
                    site.pack(trial.folder)
            # Which layers of a variant a runtime reports isn't known beforehand.
            layers = dict.fromkeys(sites) if trial.plan.variant else self._bench.layers
            return {name: wanted_widths(module, trial.float_bits[name], layers[name]) for name in sites}

    def _finetune(self, trial: _Trial, model: nn.Module, watching: Watching) -> tuple[nn.Module, TrainingReport]:
        """Train what was compressed; returns the module to deploy, on the CPU."""
        problem, plan = trial.problem, trial.plan
        start = trial.checkpoint.step if trial.checkpoint else None

        def keep(copy: nn.Module, step: int, total: int) -> None:
            with trial.watch.phase("save"):
                asked = trial.checkpoint.asked if trial.checkpoint else trial.asked.hash
                Checkpoint(trial.folder, asked, plan.hash, trial.seed, trial.epochs, step, total).save(copy)

        with trial.watch.phase("train"):
            teacher = self._teacher if plan.finetune.distillation_weight > 0 else None
            hints = self._hints if plan.finetune.hint_weight > 0 else None
            training = Training(self._training_splits, problem.task, problem.training, teacher, watching, hints)
            watching.skip((start or 0) / training.steps(trial.epochs))
            training = replace(training, rungs=watching.left)
            context = problem.context(self._calibration)
            first = plan.schedule.fractions[0]
            if start is None and first < 1:  # what was compressed wholly, for the early measurement, went too far
                model = compress_structure(problem.model.build(), plan, context, first)
            module, report = train(
                model, plan, training, context, seed=trial.seed, epochs=trial.epochs, start=start, keep=keep
            )
            release_memory()  # the runtime that measures, and other workers, may need it
        return module, report
