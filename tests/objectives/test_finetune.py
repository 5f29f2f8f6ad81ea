"""Fine-tuning on the digits: it learns, follows its schedule, asks the teacher once, and repeats exactly.

On a CPU, even where there is a GPU, unless a test is about the GPU: only there do equal seeds give equal weights.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice, pairwise, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from paretune.errors import JobError, TrialError
from paretune.objectives import gradient
from paretune.objectives.data import Inputs, Split, Splits
from paretune.objectives.data.residency import make_resident
from paretune.objectives.data.splits import Batch, Mix
from paretune.objectives.distillation import Hints, Teacher
from paretune.objectives.finetune import (
    Training,
    TrainingReport,
    TrainOptions,
    _read,
    check_training,
    fit,
)
from paretune.objectives.tasks import Classification, Regression, Task
from paretune.spaces.plan import Finetuning
from tests.nets import PlainCNN

OPTIONS = TrainOptions(batch_size=64, device="cpu", precision="float32", channels_last=False)
ALONE = Finetuning(learning_rate=3e-3, distillation_weight=0.0)


@pytest.fixture(scope="module")
def small(digit_splits: Splits) -> Splits:
    return replace(digit_splits, train=digit_splits.train.head(256))


def fresh(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PlainCNN()


def train(
    splits: Splits,
    *,
    steps: int = 8,
    options: TrainOptions = OPTIONS,
    config: Finetuning = ALONE,
    teacher: Teacher | None = None,
    seed: int = 0,
) -> nn.Module:
    model = fresh()
    training = Training(splits, Classification(), options, teacher)
    fit(model, training, config, training.batches(seed), range(steps), steps)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


@torch.no_grad()
def loss_on(model: nn.Module, split: Split) -> float:
    assert isinstance(split.inputs, Tensor)
    return float(Classification().loss(model.eval()(split.inputs), split.targets))


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(OPTIONS, id="adamw"),
        pytest.param(replace(OPTIONS, optimizer="sgd"), id="sgd"),
        pytest.param(replace(OPTIONS, precision="bfloat16"), id="bfloat16"),
        pytest.param(replace(OPTIONS, channels_last=True), id="channels last"),
        pytest.param(TrainOptions(batch_size=64, device="cpu"), id="automatic"),
        pytest.param(replace(OPTIONS, gradient_clip=None), id="no clip"),
    ],
)
def test_the_loss_falls(small: Splits, options: TrainOptions) -> None:
    config = Finetuning(learning_rate=0.05 if options.optimizer == "sgd" else 3e-3, distillation_weight=0.0)
    model = train(small, steps=48, options=options, config=config)
    assert not model.training
    assert loss_on(model, small.validation) < 0.8 * loss_on(fresh(), small.validation)


class Watch:
    """Notes learning rate, momentum and gradient norm of each step, through a hook of the optimizer class."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.norms: list[float] = []
        self.momenta: list[float] = []

    def __call__(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        settings = optimizer.param_groups[0]
        self.rates.append(settings["lr"])
        self.momenta.append(settings["betas"][0] if "betas" in settings else settings["momentum"])
        gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.norms.append(float(torch.stack(gradients).norm()))


@pytest.fixture
def watch() -> Any:
    seen = Watch()
    handle = register_optimizer_step_pre_hook(seen)
    yield seen
    handle.remove()


def test_the_rate_warms_up_and_falls_to_nothing(small: Splits, watch: Watch) -> None:
    train(small, steps=40, options=replace(OPTIONS, warmup=0.25, batch_size=8))
    peak = watch.rates.index(max(watch.rates))
    assert len(watch.rates) == 40
    assert peak == 10
    assert max(watch.rates) == pytest.approx(ALONE.learning_rate)
    assert watch.rates[: peak + 1] == sorted(watch.rates[: peak + 1])
    assert watch.rates[peak:] == sorted(watch.rates[peak:], reverse=True)
    assert 0 < watch.rates[0] < 0.2 * ALONE.learning_rate
    assert 0 < watch.rates[-1] < 0.01 * ALONE.learning_rate


def test_without_warm_up_it_starts_at_the_peak(small: Splits, watch: Watch) -> None:
    train(small, steps=5, options=replace(OPTIONS, warmup=0.0))
    assert watch.rates[0] == pytest.approx(ALONE.learning_rate)


def test_a_second_part_continues_schedule_and_batches(small: Splits, watch: Watch) -> None:
    """SGD without momentum's memory would differ, so only what is fed in is compared."""
    training = Training(small, Classification(), OPTIONS)
    whole, parted = [], []

    def note(target: list[Tensor]) -> Any:
        return lambda _module, inputs, _output: target.append(inputs[0].clone())

    for target, schedules in ((whole, [range(10)]), (parted, [range(7), range(7, 10)])):
        model, batches = fresh(), training.batches(3)
        model.register_forward_hook(note(target))
        for schedule in schedules:
            fit(model, training, ALONE, batches, schedule, 10)
    assert watch.rates[:10] == watch.rates[10:]
    assert len(whole) == len(parted) == 10
    assert all(torch.equal(one, other) for one, other in zip(whole, parted, strict=True))


def test_an_empty_part_changes_nothing(small: Splits) -> None:
    model = fresh()
    training = Training(small, Classification(), OPTIONS)
    fit(model, training, ALONE, training.batches(0), range(5, 5), 5)
    assert same(model, fresh())
    assert not model.training


def test_gradients_are_clipped(small: Splits, watch: Watch) -> None:
    train(small, steps=4, options=replace(OPTIONS, gradient_clip=0.01))
    assert max(watch.norms) <= 0.01 + 1e-6
    watch.norms.clear()
    train(small, steps=4, options=replace(OPTIONS, gradient_clip=None))
    assert max(watch.norms) > 0.01


def test_equal_seeds_give_identical_weights(small: Splits) -> None:
    assert same(train(small, seed=1), train(small, seed=1))
    assert not same(train(small, seed=1), train(small, seed=2))


@pytest.mark.parametrize("rate", [1e30, 1e12])
def test_a_diverging_loss_fails_the_trial(small: Splits, rate: float) -> None:
    config = Finetuning(learning_rate=rate, distillation_weight=0.0)
    with pytest.raises(TrialError, match=r"loss must stay finite.*lower the learning rate"):
        train(small, config=config, steps=30, options=replace(OPTIONS, optimizer="sgd", gradient_clip=None))


def test_the_first_step_whose_loss_isnt_finite_is_named() -> None:
    """On a GPU the losses of some steps are looked at together."""
    losses = {7: torch.tensor(1.0), 8: torch.tensor(torch.inf), 9: torch.tensor(torch.nan)}
    with pytest.raises(TrialError, match=r"it is inf at step 8 of 40; lower the learning rate \(it was 0.003\)"):
        _read(losses, 40, ALONE)
    _read({7: torch.tensor(1.0)}, 40, ALONE)


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "steps"),
    [
        pytest.param(256, 64, 1.0, 4, id="one epoch"),
        pytest.param(256, 64, 2.5, 10, id="two and a half"),
        pytest.param(250, 64, 1.0, 3, id="the last part is left out"),
        pytest.param(256, 64, 0.01, 1, id="at least one"),
        pytest.param(10, 64, 3.0, 3, id="fewer samples than a batch"),
    ],
)
def test_steps(small: Splits, samples: int, batch: int, epochs: float, steps: int) -> None:
    splits = replace(small, train=small.train.head(samples))
    assert Training(splits, Classification(), replace(OPTIONS, batch_size=batch)).steps(epochs) == steps


def test_batches_cover_each_epoch_in_a_new_order(small: Splits) -> None:
    batches = list(islice(Training(small, Classification(), OPTIONS).batches(0), 8))
    epochs = [torch.cat([batch.indices for batch in part]) for part in (batches[:4], batches[4:])]
    assert all(sorted(order.tolist()) == list(range(256)) for order in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_after_step_is_called_after_every_step(small: Splits) -> None:
    calls: list[int] = []
    training = Training(small, Classification(), OPTIONS, after_step=lambda _: calls.append(1))
    fit(fresh(), training, ALONE, training.batches(0), range(6), 6)
    assert len(calls) == 6


class Counting:
    """Counts the samples that a module sees."""

    def __init__(self, module: nn.Module) -> None:
        self.samples = 0
        module.register_forward_hook(self)

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        self.samples += len(inputs[0])


def test_the_teacher_computes_each_sample_once(small: Splits, trained: nn.Module) -> None:
    model = copy.deepcopy(trained)
    counting = Counting(model)
    teacher = Teacher(model, len(small.train), cached=True)
    config = Finetuning(learning_rate=1e-3, distillation_weight=1.0)
    train(small, steps=12, config=config, teacher=teacher)
    assert counting.samples == 256
    train(small, steps=4, config=config, teacher=teacher, seed=5)
    assert counting.samples == 256, "other trials find them too"
    part = small.train.subset([7, 3])
    with torch.no_grad():
        torch.testing.assert_close(teacher(part.indices, part.inputs), trained(part.inputs), atol=1e-5, rtol=1e-5)
    assert counting.samples == 256


@pytest.mark.parametrize("cached", [True, False])
def test_a_teacher_is_as_precise_as_the_training_unless_it_is_kept(
    small: Splits, trained: nn.Module, cached: bool
) -> None:
    teaching, hinting = copy.deepcopy(trained), copy.deepcopy(trained)
    seen: dict[nn.Module, torch.dtype] = {}
    for net in (teaching, hinting):
        net.register_forward_hook(lambda net, _inputs, output: seen.update({net: output.dtype}))
    teacher = Teacher(teaching, len(small.train), cached=cached)
    config = Finetuning(learning_rate=1e-3, distillation_weight=0.5, hint_weight=0.1)
    options = replace(OPTIONS, precision="bfloat16")
    training = Training(small, Classification(), options, teacher, hints=Hints(hinting, ["conv2"]))
    fit(fresh(), training, config, training.batches(0), range(2), 2)
    assert seen == {teaching: torch.float32 if cached else torch.bfloat16, hinting: torch.bfloat16}


def test_the_teacher_of_augmented_data_isnt_cached(small: Splits, trained: nn.Module) -> None:
    def flip(inputs: Inputs, generator: torch.Generator) -> Inputs:
        assert isinstance(inputs, Tensor)
        return inputs.flip(3) if float(torch.rand((), generator=generator)) < 0.5 else inputs

    model = copy.deepcopy(trained)
    counting = Counting(model)
    teacher = Teacher(model, len(small.train), cached=False)
    config = Finetuning(learning_rate=1e-3, distillation_weight=0.5)
    augmented = replace(small, augment=flip)
    one = train(augmented, steps=12, config=config, teacher=teacher)
    assert counting.samples == 12 * 64
    part = small.train.subset([7, 3])
    assert isinstance(part.inputs, Tensor)
    with torch.no_grad():
        expected = trained(part.inputs.flip(3))
    assert torch.equal(teacher(part.indices, part.inputs.flip(3)), expected)
    assert same(one, train(augmented, steps=12, config=config, teacher=teacher)), "augmentation is seeded"
    assert not same(one, train(small, steps=12, config=config, teacher=teacher))


@pytest.mark.parametrize(
    ("weight", "with_teacher", "depends"),
    [
        pytest.param(1.0, True, False, id="the teacher alone"),
        pytest.param(0.5, True, True, id="both"),
        pytest.param(0.0, True, True, id="labels alone"),
        pytest.param(1.0, False, True, id="without a teacher labels count"),
    ],
)
def test_what_the_labels_matter(
    small: Splits, trained: nn.Module, weight: float, with_teacher: bool, depends: bool
) -> None:
    config = Finetuning(learning_rate=1e-3, distillation_weight=weight)
    shuffled = Split(small.train.inputs, small.train.targets.flip(0))

    def result(split: Split) -> nn.Module:
        teacher = Teacher(copy.deepcopy(trained), len(split), cached=True) if with_teacher else None
        return train(replace(small, train=split), config=config, teacher=teacher, steps=4)

    assert same(result(small.train), result(shuffled)) is not depends


def test_a_student_learns_from_the_teacher_without_labels(small: Splits, trained: nn.Module) -> None:
    useless = Split(small.train.inputs, torch.zeros_like(small.train.targets))
    teacher = Teacher(copy.deepcopy(trained), len(useless), cached=True)
    config = Finetuning(learning_rate=5e-3, distillation_weight=1.0, temperature=2.0)
    model = train(replace(small, train=useless), config=config, teacher=teacher, steps=48)
    assert loss_on(model, small.validation) < 0.8 * loss_on(fresh(), small.validation)


def test_regression_is_trained_too(small: Splits) -> None:
    values = Split(small.train.inputs, small.train.targets.float())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))
    training = Training(replace(small, train=values), Regression(), OPTIONS)
    assert isinstance(values.inputs, Tensor)
    with torch.no_grad():
        before = Regression().metric(model(values.inputs), values.targets)
    fit(model, training, Finetuning(learning_rate=3e-2), training.batches(0), range(120), 120)
    with torch.no_grad():
        assert Regression().metric(model(values.inputs), values.targets) > max(0.1, before)


class Crowded(nn.Module):
    """A net without batch norm on a device whose memory holds only so many samples.

    Args:
        room: Samples that fit.
        fails: Forward passes, counted from 0, that fail whatever their size.
    """

    def __init__(self, room: int, *, fails: tuple[int, ...] = ()) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.room = room
        self.fails = fails
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.room or len(self.sizes) - 1 in self.fails:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return self.body(x)


def train_crowded(
    splits: Splits, model: nn.Module, *, batch_size: int, steps: int = 6, before: TrainingReport | None = None
) -> TrainingReport:
    torch.manual_seed(1)
    teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), len(splits.train), cached=True)
    training = Training(splits, Classification(), replace(OPTIONS, batch_size=batch_size), teacher)
    config = Finetuning(learning_rate=3e-3, distillation_weight=0.5)
    return fit(model, training, config, training.batches(0), range(steps), steps, before=before)


@pytest.mark.parametrize(
    ("batch_size", "room", "micro", "sizes"),
    [
        pytest.param(64, 64, 64, [64], id="all of it fits"),
        pytest.param(64, 40, 32, [64, 32, 32], id="halves"),
        pytest.param(64, 20, 16, [64, 32, 16, 16, 16, 16], id="quarters"),
        pytest.param(50, 13, 12, [50, 25, 10, 10, 10, 10, 10], id="uneven"),
        pytest.param(7, 1, 1, [7, 2, 1, 1, 1, 1, 1, 1, 1], id="one by one"),
    ],
)
def test_out_of_memory_the_step_is_done_in_parts(
    small: Splits, batch_size: int, room: int, micro: int, sizes: list[int]
) -> None:
    whole, crowded = Crowded(64), Crowded(room)
    train_crowded(small, whole, batch_size=batch_size)
    report = train_crowded(small, crowded, batch_size=batch_size)
    assert report.micro_batch == micro
    assert crowded.sizes[: len(sizes)] == sizes
    assert max(crowded.sizes[len(sizes) :]) <= micro, "the steps that follow begin with parts"
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(crowded.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)
    assert not same(crowded, Crowded(0)), "it did learn"


def test_what_a_failed_step_left_is_dropped(small: Splits) -> None:
    """The second half fails when the gradient of the first is there already."""
    whole, crowded = Crowded(64), Crowded(64, fails=(1,))
    before = replace(train_crowded(small, whole, batch_size=64), micro_batch=32)
    assert train_crowded(small, crowded, batch_size=64, before=before).micro_batch == 16
    assert crowded.sizes[:6] == [32, 32, 16, 16, 16, 16]
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(crowded.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)


def test_a_next_part_begins_with_the_size_that_fitted(small: Splits) -> None:
    crowded = Crowded(20)
    report = train_crowded(small, crowded, batch_size=64)
    crowded.sizes.clear()
    assert train_crowded(small, crowded, batch_size=64, before=report) == report
    assert max(crowded.sizes) == 16


def test_a_next_part_begins_with_the_loss_scale_that_fitted(small: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16, which jobs get on a GPU alone; the weights of a step that is skipped stay as they are."""
    monkeypatch.setattr(gradient, "float_format", lambda *_: torch.float16)
    model = fresh()
    with torch.no_grad():
        model.get_parameter("fc2.weight").mul_(100)

    def train_on(before: TrainingReport | None) -> tuple[TrainingReport, bool]:
        weight = model.get_parameter("fc2.weight").detach().clone()
        report = run(small, model, replace(OPTIONS, batch_size=256), steps=1, before=before)
        return report, not torch.equal(weight, model.get_parameter("fc2.weight"))

    report, moved = train_on(None)
    assert (report.loss_scale, moved) == (2.0**15, False)
    while not moved:
        scale = report.loss_scale
        report, moved = train_on(report)
    assert report.loss_scale == scale, "half of the one that was too large, and it fits"
    assert train_on(report)[1]


def test_a_sample_that_doesnt_fit_fails_the_trial(small: Splits) -> None:
    with pytest.raises(TrialError, match=r"one sample must fit into the memory.*use fewer workers"):
        train_crowded(small, Crowded(0), batch_size=64)


def test_the_report_says_what_the_training_ran_on(small: Splits) -> None:
    options = replace(OPTIONS, precision="bfloat16", tf32=True)
    training = Training(small, Classification(), options)
    report = fit(fresh(), training, ALONE, training.batches(0), range(1), 1)
    assert report == TrainingReport(
        "cpu",
        "bfloat16",
        tf32=False,
        channels_last=False,
        micro_batch=64,
        resident=True,
        steps=1,
        ended="schedule",
    )


def test_training_is_checked_before_anything_is_spent(small: Splits) -> None:
    def noise(inputs: Inputs, generator: torch.Generator) -> Inputs:
        assert isinstance(inputs, Tensor)
        return inputs + torch.randn(inputs.shape, generator=generator, device=generator.device)

    def broken(inputs: Inputs, generator: torch.Generator) -> Inputs:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")

    check_training(fresh(), Training(small, Classification(), OPTIONS))
    check_training(fresh(), Training(replace(small, augment=noise), Classification(), OPTIONS))
    with pytest.raises(JobError, match=r"augment function that runs on cpu.*device=generator\.device"):
        check_training(fresh(), Training(replace(small, augment=broken), Classification(), OPTIONS))
    with pytest.raises(JobError, match=r"finetune\.precision"):
        check_training(fresh(), Training(small, Classification(), replace(OPTIONS, precision="float16")))
    with pytest.raises(JobError, match=r"finetune\.device"):
        check_training(fresh(), Training(small, Classification(), replace(OPTIONS, device="cuda:99")))


class Weights:
    """Notes the weights and buffers of a model after each step of an optimizer."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.states: list[dict[str, Tensor]] = []

    def __call__(self, *_: Any) -> None:
        self.states.append({name: tensor.clone() for name, tensor in self._model.state_dict().items()})


@contextmanager
def noting(model: nn.Module) -> Iterator[Weights]:
    weights = Weights(model)
    handle = register_optimizer_step_post_hook(weights)
    try:
        yield weights
    finally:
        handle.remove()


def run(
    splits: Splits, model: nn.Module, options: TrainOptions, *, steps: int = 8, config: Finetuning = ALONE, **given: Any
) -> TrainingReport:
    training = Training(splits, Classification(), options)
    return fit(model, training, config, training.batches(0), range(steps), steps, **given)


def test_what_is_left_is_the_average(small: Splits) -> None:
    model = fresh()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with noting(model) as weights:
        run(small, model, replace(OPTIONS, ema=0.5))
    for update, state in enumerate(weights.states):
        decay = min(0.5, (1 + update) / (10 + update))
        expected = {name: decay * expected[name] + (1 - decay) * tensor for name, tensor in state.items()}
    assert not same(model, train(small)), "without the average it is another one"
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], msg=name)
        else:
            assert int(tensor) == 8, "batches are counted, not averaged"


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_cycle_reaches_the_optimizer(small: Splits, watch: Watch, optimizer: Any) -> None:
    run(small, fresh(), replace(OPTIONS, schedule="one-cycle", optimizer=optimizer), steps=20)
    assert watch.rates.index(max(watch.rates)) == watch.momenta.index(min(watch.momenta)) == 6
    assert max(watch.rates) == pytest.approx(ALONE.learning_rate)
    assert (min(watch.momenta), watch.momenta[0]) == pytest.approx((0.85, 0.95))
    assert watch.rates[-1] < 0.05 * ALONE.learning_rate


def test_labels_are_smoothed() -> None:
    outputs, targets = torch.tensor([[2.0, 1.0, 0.5]]), torch.tensor([0])
    logs = outputs.log_softmax(1)[0]
    shares = torch.tensor([0.8, 0.1, 0.1])
    task = Classification()
    assert float(task.smoothed(0.3).loss(outputs, targets)) == pytest.approx(float(-(shares * logs).sum()))
    assert float(task.loss(outputs, targets)) == pytest.approx(float(-logs[0])), "the task itself stays"


def test_smoothing_is_trained_with(small: Splits) -> None:
    def entropy(model: nn.Module) -> float:
        assert isinstance(small.train.inputs, Tensor)
        with torch.no_grad():
            logs = model(small.train.inputs).log_softmax(1)
        return float(-(logs.exp() * logs).sum(1).mean())

    smooth = train(small, steps=80, options=replace(OPTIONS, label_smoothing=0.5))
    assert entropy(smooth) > 2 * entropy(train(small, steps=80))


class OwnLoss(Classification):
    """A classification that knows nothing of smoothing."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.multi_margin_loss(outputs, targets)


@pytest.mark.parametrize("task", [Regression(), OwnLoss()])
def test_only_labels_can_be_smoothed(small: Splits, task: Task) -> None:
    training = Training(small, task, replace(OPTIONS, label_smoothing=0.1))
    with pytest.raises(JobError, match=r"finetune\.label_smoothing must be 0 .* but got 0\.1; set it to 0"):
        check_training(fresh(), training)
    check_training(fresh(), replace(training, options=OPTIONS))


def test_a_plateau_ends_the_training(small: Splits, watch: Watch) -> None:
    """What isn't trained can't get better."""
    config = Finetuning(learning_rate=1e-9, distillation_weight=0.0)
    options = replace(OPTIONS, plateau=0.1, batch_size=256, freeze_batchnorm=1.0)
    report = run(small, fresh(), options, config=config, steps=60)
    assert (report.ended, report.steps) == ("plateau", 6 + 12 + 6), "a rise, twice the patience, and the rest in short"
    assert len(watch.rates) == report.steps
    tail = watch.rates[-6:]
    assert tail == sorted(tail, reverse=True)
    assert tail[-1] < 0.01 * config.learning_rate
    assert run(small, fresh(), replace(options, plateau=None), config=config, steps=60).steps == 60


def test_parts_are_reported_as_one(small: Splits) -> None:
    first = run(small, fresh(), OPTIONS, steps=2)
    whole = replace(first, ended="plateau").then(replace(first, steps=3, micro_batch=32))
    assert (whole.steps, whole.ended, whole.micro_batch) == (5, "plateau", 32)


@pytest.mark.parametrize(("share", "moving"), [(0.0, 8), (0.25, 6), (1.0, 0)])
def test_frozen_statistics_stay(small: Splits, share: float, moving: int) -> None:
    model = fresh()
    with noting(model) as weights:
        run(small, model, replace(OPTIONS, freeze_batchnorm=share))
    means = [fresh().get_buffer("bn1.running_mean"), *(state["bn1.running_mean"] for state in weights.states)]
    assert [not torch.equal(a, b) for a, b in pairwise(means)] == [True] * moving + [False] * (8 - moving)
    scales = [state["bn1.weight"] for state in weights.states]
    assert not any(torch.equal(a, b) for a, b in pairwise(scales)), "what is learnt goes on"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(OPTIONS, id="adamw"),
        pytest.param(replace(OPTIONS, optimizer="sgd", weight_decay=0.1), id="sgd"),
        pytest.param(replace(OPTIONS, gradient_clip=0.01, weight_decay=0.1), id="clipped"),
        pytest.param(replace(OPTIONS, ema=0.9), id="average"),
        pytest.param(replace(OPTIONS, schedule="one-cycle", precision="bfloat16", channels_last=True), id="cycle"),
    ],
)
def test_ties_keep_zeros_and_equals(small: Splits, options: TrainOptions) -> None:
    model = fresh()
    sparse, shared = model.get_parameter("conv2.weight"), model.get_parameter("fc1.weight")
    with torch.no_grad():
        sparse.mul_(torch.rand(sparse.shape, generator=torch.Generator().manual_seed(0)) < 0.3)
        shared.copy_(shared.sign() * shared.abs().mean())
    mask, positive, before = sparse != 0, shared > 0, shared.detach().clone()

    def keep_zeros() -> None:
        assert sparse.grad is not None
        sparse.grad.mul_(mask)

    def keep_equals() -> None:
        assert shared.grad is not None
        for cluster in (positive, ~positive):
            shared.grad[cluster] = shared.grad[cluster].mean()

    for part in (range(12), range(12, 20)):
        training = Training(small, Classification(), options)
        fit(model, training, ALONE, training.batches(0), part, 20, ties=(keep_zeros, keep_equals))
    assert bool((sparse[~mask] == 0).all())
    assert bool((sparse[mask] != 0).all())
    assert len(shared.unique()) == 2
    assert not torch.equal(shared, before), "they did learn"


def test_ties_come_after_the_gradient_and_before_the_clipping(small: Splits, watch: Watch) -> None:
    model = fresh()
    weight = model.get_parameter("fc2.weight")
    norms: list[float] = []

    def tie() -> None:
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        assert weight.grad is not None
        weight.grad.fill_(100.0)

    run(small, model, replace(OPTIONS, gradient_clip=0.5), steps=4, ties=[tie])
    assert len(norms) == 4
    assert min(norms) > 0.5, "not clipped yet"
    assert watch.norms == pytest.approx([0.5] * 4, rel=1e-3), "what the tie put there was clipped, too"


def test_a_mixed_batch_is_cut_like_any_other(small: Splits) -> None:
    options = replace(OPTIONS, augment=("mixup",))
    whole, parted = Crowded(64), Crowded(20)
    for model in (whole, parted):
        run(small, model, options)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parted.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)
    plain = Crowded(64)
    run(small, plain, OPTIONS)
    assert not same(plain, whole)


def test_a_mixed_batch_has_both_targets(small: Splits) -> None:
    """Half of the other samples' targets is all that can be learnt of them."""
    inputs = torch.ones(4, 1, 8, 8)
    batch = Batch(
        torch.arange(4), inputs, torch.zeros(4, dtype=torch.int64), Mix(torch.ones(4, dtype=torch.int64), 0.7)
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    training = Training(small, Classification(), OPTIONS)
    config = Finetuning(learning_rate=0.05, distillation_weight=0.0)
    fit(model, training, config, repeat(batch), range(200), 200)
    with torch.no_grad():
        assert model(inputs).softmax(1)[0, :2].tolist() == pytest.approx([0.7, 0.3], abs=0.01)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_hints_are_followed(small: Splits, trained: nn.Module, precision: Any) -> None:
    def distance(model: nn.Module) -> float:
        found: list[Tensor] = []
        for net in (model, trained):
            handle = net.get_submodule("conv2").register_forward_hook(lambda _m, _i, output: found.append(output))
            with torch.no_grad():
                net.eval()(small.validation.inputs)
            handle.remove()
        return float(nn.functional.mse_loss(*found))

    model = fresh()
    model.load_state_dict(trained.state_dict())
    with torch.no_grad():
        model.get_parameter("conv1.weight").mul_(torch.rand(16, 1, 1, 1))
    before = distance(model)
    hints = Hints(copy.deepcopy(trained), ["conv2"])
    options = replace(OPTIONS, precision=precision)
    training = Training(small, Classification(), options, hints=hints)
    config = Finetuning(learning_rate=1e-3, distillation_weight=0.0, hint_weight=10.0)
    seen = list(islice(training.batches(0), 20))
    batches = iter(seen)
    fit(model, training, config, batches, range(20), 20)
    assert next(batches, None) is None, "the batch that the hints looked at was trained on"
    assert distance(model) < 0.7 * before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_channels_last_is_for_nets_that_it_makes_faster(small: Splits) -> None:
    def chosen(model: nn.Module, wanted: Any = "auto") -> bool:
        return run(small, model, replace(OPTIONS, channels_last=wanted), steps=1).channels_last

    head = (nn.Flatten(), nn.Linear(64, 10))
    assert chosen(fresh())
    assert not chosen(fresh(), False)
    assert not chosen(nn.Sequential(*head))
    assert not chosen(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.GroupNorm(1, 1), *head))
    deep = nn.Sequential(nn.Unflatten(1, (1, 1)), nn.Conv3d(1, 1, 3, padding=1), *head)
    assert chosen(deep, True), "weights with five axes stay as they are"
    assert not chosen(deep)


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


class Counted(nn.Module):
    """Counts its calls, as quantizers do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.calls = 0
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x) * (0.5 if self.calls % 4 == 0 else 1.0)


@needs_compiler
def test_compiled_training_gives_the_same(small: Splits) -> None:
    """Few compilations suffice for many steps, and the second model finds nothing of the first."""
    limits = {"recompile_limit": 3, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits):
        for width in (16, 24):
            compiled, eager = Counted(width), Counted(width)
            run(small, compiled, replace(OPTIONS, compile=True))
            run(small, eager, OPTIONS)
            for name, tensor in eager.state_dict().items():
                torch.testing.assert_close(compiled.state_dict()[name], tensor, atol=1e-5, rtol=1e-4)
    assert not same(eager, Counted(24)), "it did learn"


def test_what_cant_be_compiled_is_named(small: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing is there already
    options = replace(OPTIONS, compile=True)
    with config.patch({"cpp.cxx": ("/no/compiler",)}):
        with pytest.raises(TrialError, match=r"able to compile.*C\+\+ compiler.*set finetune\.compile: false"):
            run(small, Counted(8), options)
        with pytest.raises(JobError, match=r"finetune\.compile must be possible on cpu, but got .*C\+\+ compiler"):
            check_training(Counted(8), Training(small, Classification(), options))


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
GPU = torch.device("cuda", 0)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("precision", ["auto", "float32", "float16"])
@pytest.mark.parametrize("resident", [True, False])
def test_a_gpu_learns(small: Splits, trained: nn.Module, precision: Any, resident: bool) -> None:
    options = replace(OPTIONS, device="cuda", precision=precision, channels_last=True)
    train_split = make_resident(small.train, GPU) if resident else small.train
    model = fresh()
    teacher = Teacher(copy.deepcopy(trained), len(small.train), cached=True)
    training = Training(replace(small, train=train_split), Classification(), options, teacher)
    config = Finetuning(learning_rate=3e-3, distillation_weight=0.5)
    report = fit(model, training, config, training.batches(0), range(48), 48)
    assert (report.device, report.micro_batch, report.resident) == ("cuda:0", 64, resident)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}, "it is back where it was"
    assert loss_on(model, small.validation) < 0.8 * loss_on(fresh(), small.validation)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_gpu_knows_every_option(small: Splits, trained: nn.Module, optimizer: Any, precision: Any) -> None:
    options = TrainOptions(
        batch_size=64, device="cuda", optimizer=optimizer, precision=precision, schedule="one-cycle", ema=0.9,
        label_smoothing=0.1, freeze_batchnorm=0.3, plateau=0.1, augment=("crop", "mixup"),
    )  # fmt: skip
    model = fresh()
    weight = model.get_parameter("conv2.weight")
    with torch.no_grad():
        weight[:, ::2] = 0

    def tie() -> None:
        assert weight.grad is not None
        weight.grad[:, ::2] = 0

    hints = Hints(copy.deepcopy(trained), ["conv2"])
    training = Training(small, Classification(), options, hints=hints)
    config = Finetuning(learning_rate=0.02 if optimizer == "sgd" else 3e-3, distillation_weight=0.0, hint_weight=0.1)
    report = fit(model, training, config, training.batches(0), range(100), 100, ties=[tie])
    assert report.steps <= 100
    assert bool((weight[:, ::2] == 0).all())
    assert loss_on(model, small.validation) < 0.8 * loss_on(fresh(), small.validation)


@pytest.mark.gpu
@gpu
def test_a_gpu_trains_compiled(small: Splits) -> None:
    model = Counted(16)
    report = run(small, model, replace(OPTIONS, device="cuda", compile=True), steps=30)
    assert report.device == "cuda:0"
    assert loss_on(model, small.validation) < loss_on(Counted(16), small.validation)


@pytest.mark.gpu
@gpu
def test_a_gpu_sees_the_indices_of_a_cpu(small: Splits) -> None:
    def indices(options: TrainOptions) -> Tensor:
        return torch.cat([b.indices for b in islice(Training(small, Classification(), options).batches(3), 10)])

    assert torch.equal(indices(OPTIONS), indices(replace(OPTIONS, device="cuda")))


@pytest.mark.gpu
@gpu
def test_augmentation_runs_on_the_gpu(small: Splits) -> None:
    seen: list[tuple[str, str]] = []

    def noise(inputs: Inputs, generator: torch.Generator) -> Inputs:
        assert isinstance(inputs, Tensor)
        seen.append((inputs.device.type, generator.device.type))
        return inputs + torch.randn(inputs.shape, generator=generator, device=generator.device)

    def stuck(inputs: Inputs, generator: torch.Generator) -> Inputs:
        assert isinstance(inputs, Tensor)
        return inputs + torch.randn(inputs.shape, generator=torch.Generator())

    options = replace(OPTIONS, device="cuda")
    augmented = replace(small, augment=noise)
    check_training(fresh(), Training(augmented, Classification(), options))
    one, other = (next(Training(augmented, Classification(), options).batches(5)).inputs for _ in range(2))
    assert isinstance(one, Tensor) and isinstance(other, Tensor)
    assert torch.equal(one, other)
    assert set(seen) == {("cuda", "cuda")}
    with pytest.raises(JobError, match=r"augment function that runs on cuda:0"):
        check_training(fresh(), Training(replace(small, augment=stuck), Classification(), options))


class Stuck(nn.Module):
    """Holds a tensor that doesn't move with the model."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.mean = torch.zeros(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1) - self.mean)


@pytest.mark.gpu
@gpu
def test_a_model_that_cant_move_is_found_before_anything_is_spent(small: Splits) -> None:
    with pytest.raises(JobError, match=r"model must run on cuda:0.*register the tensors"):
        check_training(Stuck(), Training(small, Classification(), replace(OPTIONS, device="cuda")))


@pytest.mark.gpu
@gpu
def test_a_diverging_loss_fails_the_trial_on_a_gpu(small: Splits) -> None:
    options = replace(OPTIONS, device="cuda", optimizer="sgd", gradient_clip=None)
    config = Finetuning(learning_rate=1e30, distillation_weight=0.0)
    with pytest.raises(TrialError, match=r"loss must stay finite"):
        train(small, config=config, steps=30, options=options)


@pytest.mark.gpu
@gpu
def test_a_measurement_waits_for_few_steps_of_a_gpu(small: Splits) -> None:
    calls: list[int] = []
    options = replace(OPTIONS, device="cuda")
    training = Training(small, Classification(), options, after_step=lambda _: calls.append(1))
    fit(fresh(), training, ALONE, training.batches(0), range(45), 45)
    assert len(calls) == 3


class Wide(nn.Module):
    """Wants 64 MiB of a GPU for every sample, for the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        wide = x.repeat(1, 2**18) * self.head.weight.sum()
        return self.head(x) + 1e-9 * wide.sin().mean(1, keepdim=True)


@pytest.mark.gpu
@gpu
def test_a_gpu_out_of_memory_goes_on_in_parts(small: Splits) -> None:
    before = torch.cuda.get_per_process_memory_fraction(GPU)
    _, total = torch.cuda.mem_get_info(GPU)
    training = Training(small, Classification(), replace(OPTIONS, device="cuda"))
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(2 * 2**30 / total, GPU)
        report = fit(Wide(), training, ALONE, training.batches(0), range(3), 3)
    finally:
        torch.cuda.set_per_process_memory_fraction(before, GPU)
    assert 1 <= report.micro_batch < 32
