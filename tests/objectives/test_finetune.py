"""Fine-tuning on the digits: it learns, follows its schedule, asks the teacher once, and repeats exactly.

On a CPU, even where there is a GPU, unless a test is about the GPU: only there do equal seeds give equal weights.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from paretune.errors import JobError, TrialError
from paretune.objectives.data import Inputs, Split, Splits
from paretune.objectives.data.residency import make_resident
from paretune.objectives.finetune import (
    Teacher,
    Training,
    TrainingReport,
    TrainOptions,
    _check_finite,
    check_training,
    fit,
)
from paretune.objectives.tasks import Classification, Regression
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
    """Notes the learning rate of each step of an optimizer, through a hook of the optimizer class."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.norms: list[float] = []

    def __call__(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])
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
        _check_finite(losses, 40, ALONE)
    _check_finite({7: torch.tensor(1.0)}, 40, ALONE)


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
    training = Training(small, Classification(), OPTIONS, after_step=lambda: calls.append(1))
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
    splits: Splits, model: nn.Module, *, batch_size: int, steps: int = 6, micro_batch: int | None = None
) -> TrainingReport:
    torch.manual_seed(1)
    teacher = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), len(splits.train), cached=True)
    training = Training(splits, Classification(), replace(OPTIONS, batch_size=batch_size), teacher)
    config = Finetuning(learning_rate=3e-3, distillation_weight=0.5)
    return fit(model, training, config, training.batches(0), range(steps), steps, micro_batch=micro_batch)


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
    train_crowded(small, whole, batch_size=64)
    assert train_crowded(small, crowded, batch_size=64, micro_batch=32).micro_batch == 16
    assert crowded.sizes[:6] == [32, 32, 16, 16, 16, 16]
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(crowded.state_dict()[name], tensor, atol=1e-5, rtol=1e-5)


def test_a_next_part_begins_with_the_size_that_fitted(small: Splits) -> None:
    crowded = Crowded(20)
    report = train_crowded(small, crowded, batch_size=64, steps=1)
    crowded.sizes.clear()
    assert train_crowded(small, crowded, batch_size=64, micro_batch=report.micro_batch) == report
    assert max(crowded.sizes) == 16


def test_a_sample_that_doesnt_fit_fails_the_trial(small: Splits) -> None:
    with pytest.raises(TrialError, match=r"one sample must fit into the memory.*use fewer workers"):
        train_crowded(small, Crowded(0), batch_size=64)


def test_the_report_says_what_the_training_ran_on(small: Splits) -> None:
    options = replace(OPTIONS, precision="bfloat16", tf32=True)
    training = Training(small, Classification(), options)
    report = fit(fresh(), training, ALONE, training.batches(0), range(1), 1)
    assert report == TrainingReport("cpu", "bfloat16", tf32=False, micro_batch=64, resident=True)


def test_training_is_checked_before_anything_is_spent(small: Splits) -> None:
    def noise(inputs: Inputs, generator: torch.Generator) -> Inputs:
        assert isinstance(inputs, Tensor)
        return inputs + torch.randn(inputs.shape, generator=generator, device=generator.device)

    def broken(inputs: Inputs, generator: torch.Generator) -> Inputs:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")

    check_training(fresh(), small, OPTIONS)
    check_training(fresh(), replace(small, augment=noise), OPTIONS)
    with pytest.raises(JobError, match=r"augment function that runs on cpu.*device=generator\.device"):
        check_training(fresh(), replace(small, augment=broken), OPTIONS)
    with pytest.raises(JobError, match=r"finetune\.precision"):
        check_training(fresh(), small, replace(OPTIONS, precision="float16"))
    with pytest.raises(JobError, match=r"finetune\.device"):
        check_training(fresh(), small, replace(OPTIONS, device="cuda:99"))


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
    check_training(fresh(), augmented, options)
    one, other = (next(Training(augmented, Classification(), options).batches(5)).inputs for _ in range(2))
    assert isinstance(one, Tensor) and isinstance(other, Tensor)
    assert torch.equal(one, other)
    assert set(seen) == {("cuda", "cuda")}
    with pytest.raises(JobError, match=r"augment function that runs on cuda:0"):
        check_training(fresh(), replace(small, augment=stuck), options)


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
        check_training(Stuck(), small, replace(OPTIONS, device="cuda"))


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
    training = Training(small, Classification(), options, after_step=lambda: calls.append(1))
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
