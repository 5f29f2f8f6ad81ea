"""Teachers: ensembles, hints that a student's features follow, and what a job says of both."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from paretune.errors import JobError, TrialError
from paretune.objectives.compress.batchnorm import fold_batchnorm
from paretune.objectives.data import Split, Splits
from paretune.objectives.data.inputs import call
from paretune.objectives.data.splits import Batch
from paretune.objectives.distillation import AttachedHints, Ensemble, Hints, Teacher, check_teaching
from paretune.objectives.models import ModelSource
from paretune.objectives.tasks import Classification, Regression
from paretune.search.job import load_job, make_job
from paretune.search.job_sections import ModelSection
from paretune.search.problem import _teachers
from paretune.spaces.graph import prune
from tests.nets import PlainCNN


class Fixed(nn.Module):
    """Gives the same outputs whatever it sees."""

    def __init__(self, outputs: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.outputs = nn.Parameter(torch.tensor(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs[: len(x)]


@pytest.fixture
def batch(digit_splits: Splits) -> Batch:
    return next(digit_splits.train.head(96).batches(96))


def fresh(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return PlainCNN()


def forward(model: nn.Module) -> Tensor:
    return model(torch.zeros(2, 1, 8, 8))


# ---------------------------------------------------------------- ensembles


def test_classifiers_teach_the_mean_of_their_probabilities() -> None:
    models = [Fixed([[0.0, 2.0, -1.0]]), Fixed([[3.0, 0.5, 0.0]]), Fixed([[40.0, 0.0, 0.0]])]
    teacher = Teacher(Ensemble(models, Classification().ensemble), 1, cached=True)
    taught = teacher(torch.tensor([0]), torch.zeros(1, 1))
    mean = torch.stack([model.outputs.softmax(1) for model in models]).mean(0)
    torch.testing.assert_close(taught.softmax(1), mean)
    # Logits that are probabilities already soften as any others do.
    softened = mean.sqrt() / mean.sqrt().sum()
    torch.testing.assert_close((taught / 2).softmax(1), softened)
    student = taught.detach() + 5.0
    assert float(Classification().distillation_loss(student, taught, 3.0)) == pytest.approx(0, abs=1e-6)


def test_an_ensemble_of_dense_predictions_keeps_positions_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = [torch.randn(2, 4, 3, 3, generator=generator) for _ in range(2)]
    taught = Classification().ensemble(outputs)
    torch.testing.assert_close(taught.exp(), (outputs[0].softmax(1) + outputs[1].softmax(1)) / 2)


def test_other_tasks_teach_the_mean_of_the_outputs() -> None:
    models = [Fixed([[1.0], [2.0]]), Fixed([[3.0], [-2.0]])]
    taught = Ensemble(models, Regression().ensemble)(torch.zeros(2, 1))
    assert taught.tolist() == [[2.0], [0.0]]


def test_a_single_teachers_outputs_stay_as_they_are(trained: nn.Module, batch: Batch) -> None:
    with torch.no_grad():
        taught = call(Ensemble([trained], Classification().ensemble), batch.inputs)
        assert torch.equal(taught, call(trained, batch.inputs))


def test_an_ensembles_outputs_are_cached_and_its_models_evaluate(batch: Batch, trained: nn.Module) -> None:
    models = [copy.deepcopy(trained).train(), fresh().train()]
    calls: list[int] = []
    for model in models:
        model.register_forward_hook(lambda *_: calls.append(1))
    teacher = Teacher(Ensemble(models, Classification().ensemble), 96, cached=True)
    one = teacher(batch.indices, batch.inputs)
    assert not any(model.training for model in models)
    assert torch.equal(teacher(batch.indices, batch.inputs), one)
    assert len(calls) == 2


# ---------------------------------------------------------------- hints

LAYERS = ["conv1", "bn2", "fc1"]


def losses(attached: AttachedHints, student: nn.Module, batch: Batch, steps: int, rate: float) -> list[float]:
    """Train student and regressors on the hints alone."""
    parameters = [*student.parameters(), *attached.parameters()]
    optimizer = torch.optim.Adam(parameters, rate)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        call(student, batch.inputs)
        loss = attached.loss(batch)
        torch.autograd.backward(loss)
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@torch.no_grad()
def loss_of(attached: AttachedHints, student: nn.Module, part: Batch) -> float:
    call(student, part.inputs)
    return float(attached.loss(part))


def test_a_student_that_is_its_teacher_has_nothing_to_learn(trained: nn.Module, batch: Batch) -> None:
    student = copy.deepcopy(trained).eval()
    attached = Hints(trained, LAYERS).attach(student, batch)
    assert loss_of(attached, student, batch) < 1e-3


def test_the_loss_falls_and_reaches_the_student(trained: nn.Module, batch: Batch) -> None:
    student = fresh(1)
    attached = Hints(trained, LAYERS).attach(student, batch)
    call(student, batch.inputs)
    torch.autograd.backward(attached.loss(batch))
    for name in ("conv1.weight", "bn2.weight", "fc1.weight"):
        gradient = student.get_parameter(name).grad
        assert gradient is not None
        assert float(gradient.abs().max()) > 0, name
    assert student.get_parameter("fc2.weight").grad is None, "it comes after the last hint"
    assert all(parameter.grad is not None for parameter in attached.parameters())
    found = losses(attached, student, batch, 40, 3e-3)
    assert 0 < found[-1] < 0.8 * found[0]


def test_a_pruned_student_follows_with_fewer_channels(trained: nn.Module, batch: Batch) -> None:
    student = copy.deepcopy(trained)
    prune(student, forward, {"conv1": 8, "conv2": 16, "fc1": 16})
    student.train()  # its running statistics are those of the dense model, so eval mode would give other features
    attached = Hints(trained, LAYERS).attach(student, batch)
    shapes = [tuple(parameter.shape) for parameter in attached.parameters()]
    assert shapes == [(16, 8), (16,), (32, 16), (32,), (32, 16), (32,)]
    found = losses(attached, student, batch, 40, 3e-3)
    assert found[-1] < 0.7 * found[0] < 0.7, "the first fit alone explains a part of the features"


def test_folded_batch_norm_leaves_the_hint_in_place(trained: nn.Module, batch: Batch) -> None:
    student = fold_batchnorm(trained, forward)
    attached = Hints(trained, LAYERS).attach(student, batch)
    assert loss_of(attached, student, batch) < 1e-3


def test_the_first_fit_is_least_squares(batch: Batch) -> None:
    """Features that are a linear map of the student's are explained wholly; unrelated ones not at all."""
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
    teacher = nn.Sequential(copy.deepcopy(student), nn.Linear(6, 3))
    attached = Hints(teacher, {"1": "1"}).attach(student, batch)
    assert loss_of(attached, student, batch) < 1e-3
    noise = Hints(Fixed(torch.randn(96, 5).tolist()), {"1": ""}).attach(student, batch)
    assert 0.5 < loss_of(noise, student, batch) <= 1


def test_the_scale_of_the_features_doesnt_matter(trained: nn.Module, batch: Batch) -> None:
    louder = copy.deepcopy(trained)
    with torch.no_grad():
        louder.get_parameter("fc1.weight").mul_(100)
        louder.get_parameter("fc1.bias").mul_(100)
    student = fresh(1).eval()
    found = [loss_of(Hints(teacher, ["fc1"]).attach(student, batch), student, batch) for teacher in (trained, louder)]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_parts_of_a_batch_add_up(trained: nn.Module, batch: Batch) -> None:
    student = fresh(1).eval()
    attached = Hints(trained, LAYERS).attach(student, batch)
    assert isinstance(batch.inputs, Tensor)
    parts = [Batch(batch.indices[at], batch.inputs[at], batch.targets[at]) for at in (slice(32), slice(32, 96))]
    whole = loss_of(attached, student, batch)
    one, other = (loss_of(attached, student, part) for part in parts)
    assert (one + 2 * other) / 3 == pytest.approx(whole, rel=1e-4)


def test_attaching_leaves_student_and_randomness_as_they_are(trained: nn.Module, batch: Batch) -> None:
    student = copy.deepcopy(trained).train()
    student.get_submodule("bn1").eval()
    before, state = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    attached = Hints(trained, LAYERS).attach(student, batch)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert [student.training, student.get_submodule("bn1").training] == [True, False]
    attached.close()
    for module in [*student.modules(), *trained.modules()]:
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_what_a_layer_gave_is_kept_from_changes_in_place(batch: Batch) -> None:
    """A student whose ReLU was replaced still pairs its layer with what the teacher's gave before its own."""
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    student = copy.deepcopy(teacher)
    student[2] = nn.Identity()
    attached = Hints(teacher, ["1"]).attach(student, batch)
    assert loss_of(attached, student, batch) < 1e-4


def test_maps_of_other_sizes_are_pooled(batch: Batch) -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten())
    student = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
    attached = Hints(teacher, ["1"]).attach(student, batch)
    found = losses(attached, student, batch, 30, 1e-2)
    assert found[-1] < found[0] < 1


def test_tokens_have_their_channels_last(batch: Batch) -> None:
    class Tokens(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.embed = nn.Linear(8, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.embed(x.squeeze(1)).mean(1)

    student = Tokens(4)
    attached = Hints(Tokens(6), ["embed"]).attach(student, batch)
    assert [tuple(parameter.shape) for parameter in attached.parameters()] == [(6, 4), (6,)]
    assert loss_of(attached, student, batch) < 1


class Patches(nn.Module):
    """A convolution whose map becomes tokens, as a vision transformer's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(1, width, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x).flatten(2).transpose(1, 2)


class Pixels(nn.Module):
    """Linear layers on the last axis of a map, which then gets its channels to the front, as ConvNeXt's blocks do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(1, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x.movedim(1, -1)).movedim(-1, 1)


def pooled(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.Flatten())


@pytest.mark.parametrize(
    ("teacher", "student", "layer", "channels"),
    [
        pytest.param(Patches(6), Patches(4), "0", (4, 6), id="patches"),
        pytest.param(Patches(6), Patches(6), "0", (6, 6), id="equal patches"),
        pytest.param(Patches(16), Patches(12), "0", (12, 16), id="as many patches as channels"),
        pytest.param(Pixels(6), Pixels(6), "0", (6, 6), id="moved to the front"),
        pytest.param(
            nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 5, 3), nn.ReLU()),
            nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 3, 3), nn.ReLU()),
            "0.2",
            (3, 5),
            id="after a convolution",
        ),
        pytest.param(
            nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 5, 3), nn.ReLU()),
            nn.Sequential(nn.Flatten(2), nn.Conv1d(1, 5, 3, stride=2), nn.ReLU()),
            "0.2",
            (5, 5),
            id="other lengths",
        ),
        pytest.param(
            nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()),
            "0.1",
            (8, 8),
            id="as many rows as channels",
        ),
    ],
)
def test_channels_are_told_from_positions(
    batch: Batch, teacher: nn.Module, student: nn.Module, layer: str, channels: tuple[int, int]
) -> None:
    attached = Hints(pooled(teacher), [layer]).attach(pooled(student), batch)
    weight, _ = attached.parameters()
    assert tuple(weight.shape) == channels[::-1]


@pytest.mark.parametrize("net", [Patches(16), nn.Sequential(nn.Flatten(2), nn.Flatten(1, 1))])
def test_channels_that_cant_be_told_are_refused(batch: Batch, net: nn.Module) -> None:
    message = r"channels can be told from positions, but got 0 of the teacher with \(96, \d+, \d+\); name a convolution"
    with pytest.raises(JobError, match=message):
        Hints(pooled(net), ["0"]).attach(pooled(copy.deepcopy(net)), batch)


class Odd(PlainCNN):
    """Has a layer that never runs, and one that returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(2, 2)
        self.lstm = nn.LSTM(8, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        self.lstm(x[:, 0])
        return super().forward(x)


def test_a_layer_that_training_skips_fails_the_trial(trained: nn.Module, batch: Batch) -> None:
    student = copy.deepcopy(trained)
    attached = Hints(trained, ["fc1"]).attach(student, batch)
    with pytest.raises(TrialError, match="must run in every training step, but fc1 didn't"):
        attached.loss(batch)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        pytest.param(["conv9"], r"layers of the model, but got 'conv9'; did you mean 'conv", id="unknown"),
        pytest.param({"conv1": "conv9"}, r"layers of the teacher, but got 'conv9'; did you mean", id="of the teacher"),
        pytest.param(["idle"], r"that the model runs, but got 'idle', which isn't called", id="never runs"),
        pytest.param(["lstm"], r"return one tensor, but got lstm of the model with tuple", id="two tensors"),
        pytest.param({"conv1": "fc1"}, r"as many axes, but got conv1 with \(96, 16, 8, 8\) for fc1", id="axes"),
    ],
)
def test_hints_that_cant_be_followed_are_refused(batch: Batch, layers: Any, message: str) -> None:
    student = Odd()
    with pytest.raises(JobError, match=message) as caught:
        Hints(Odd(), layers).attach(student, batch)
    assert caught.value.where == "finetune.hints"
    assert not any(module._forward_hooks for module in student.modules())


# ---------------------------------------------------------------- before anything is spent


def test_good_teachers_pass(trained: nn.Module, digit_splits: Splits) -> None:
    check_teaching(fresh(), [trained, fresh(2)], digit_splits, Classification(), {"conv1": "bn1"})


def test_teachers_of_another_task_are_refused(digit_splits: Splits) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 12))
    with pytest.raises(JobError, match=r"^teacher must give outputs that compare.*\(2, 12\) for \(2, 10\)"):
        check_teaching(fresh(), [other], digit_splits, Classification(), ())
    with pytest.raises(JobError, match=r"\(2, 10\) and \(2, 12\) for \(2, 10\)"):
        check_teaching(fresh(), [fresh(), other], digit_splits, Classification(), ())


def test_values_are_never_broadcast_against_the_teachers(digit_splits: Splits) -> None:
    train = digit_splits.train
    splits = Splits(*[Split(train.inputs, train.targets.float())] * 3)
    wide, column = (nn.Sequential(nn.Flatten(), nn.Linear(64, width)) for width in (3, 1))
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
    check_teaching(flat, [column], splits, Regression(), ())
    with pytest.raises(JobError, match="teacher must give outputs that compare"):
        check_teaching(flat, [wide], splits, Regression(), ())


def test_hints_are_tried_with_the_first_teacher(digit_splits: Splits) -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    check_teaching(fresh(), [fresh(1), other], digit_splits, Classification(), ["fc1"])
    with pytest.raises(JobError, match=r"^finetune\.hints must name layers of the teacher"):
        check_teaching(fresh(), [other, fresh(1)], digit_splits, Classification(), ["fc1"])


def test_a_variant_without_the_layer_is_named(digit_splits: Splits) -> None:
    variant = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    message = r"^finetune\.hints must name layers of model\.variants\.slim, but got 'fc1'; known are 0, 1 \(name layers"
    with pytest.raises(JobError, match=message):
        check_teaching(variant, [fresh()], digit_splits, Classification(), ["fc1"], role="model.variants.slim")


# ---------------------------------------------------------------- the job

JOB = {"name": "a", "model": {"factory": "project:build", "args": {"width": 2}}, "data": "digits"}


def test_a_list_of_teachers_survives_being_written(tmp_path: Path) -> None:
    several = ["same", {"factory": "project:big", "weights": "big.pt"}, {"factory": PlainCNN}]
    job = make_job({**JOB, "teacher": several}, folder=tmp_path)
    assert isinstance(job.teacher, list)
    assert job.teacher[0] == "same"
    assert isinstance(job.teacher[1], ModelSection)
    assert job.teacher[1].weights == tmp_path / "big.pt"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "job.yaml").write_text(job.to_yaml())
    again = load_job(tmp_path / "run")
    assert again.teacher[:2] == job.teacher[:2]  # type: ignore[index]
    assert again.teacher[2].factory == "tests.nets:PlainCNN"  # type: ignore[index]
    assert str(Path(__file__).parents[2]) in yaml.safe_load(job.to_yaml())["python_path"]
    sources = _teachers(again)
    assert [source.key for source in sources] == ["teacher[0]", "teacher[1]", "teacher[2]"]
    assert [source.factory for source in sources] == ["project:build", "project:big", "tests.nets:PlainCNN"]
    assert sources[0].args == {"width": 2}


@pytest.mark.parametrize("teacher", ["same", None])
def test_the_dense_model_or_nothing_needs_no_source(teacher: str | None) -> None:
    assert _teachers(make_job({**JOB, "teacher": teacher})) == ()


def test_one_other_teacher_is_called_so() -> None:
    (source,) = _teachers(make_job({**JOB, "teacher": {"factory": "project:big"}}))
    assert source == ModelSource("project:big", {}, None, "teacher")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        pytest.param([], r"^teacher must name at least one model, but got \[\]; write same", id="none"),
        pytest.param(["same", "same"], r"^teacher must not repeat an entry, but got 'same'", id="twice"),
        pytest.param(["same", "some"], r"^teacher\[1\] must be 'same', but got 'some'", id="unknown"),
        pytest.param([None], r"^teacher\[0\] must be a mapping of keys, but got None", id="null"),
        pytest.param([["same"]], r"^teacher\[0\] must be a mapping of keys", id="nested"),
        pytest.param([{"args": {}}], r"^teacher\[0\]\.factory must be given", id="without factory"),
    ],
)
def test_wrong_lists_of_teachers(teacher: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        make_job({**JOB, "teacher": teacher})


@pytest.mark.parametrize("hints", [[], ["a", "b.c"], {"a": "b"}], ids=["none", "list", "mapping"])
def test_hints_survive_being_written(tmp_path: Path, hints: Any) -> None:
    space = {"hint_weight": [0, 1]} if hints else {}
    job = make_job({**JOB, "space": space, "finetune": {"hints": hints, "augment": ["mixup", "crop"]}})
    (tmp_path / "job.yaml").write_text(job.to_yaml())
    again = load_job(tmp_path)
    assert again.finetune.hints == hints
    assert again.finetune.augment == ["mixup", "crop"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param({"finetune": {"hints": "a"}}, r"^finetune\.hints must be a list of layers' names", id="text"),
        pytest.param({"finetune": {"hints": {"a": 3}}}, r"^finetune\.hints must be a list", id="number"),
        pytest.param({"finetune": {"hints": ["a", "a"]}}, r"^finetune\.hints must not repeat", id="twice"),
        pytest.param(
            {"finetune": {"hints": ["a"]}, "teacher": None},
            r"finetune\.hints must be empty without a teacher.*teacher: same",
            id="without teacher",
        ),
        pytest.param(
            {"finetune": {"hints": ["a"]}},
            r"^space\.hint_weight must reach above 0 with finetune\.hints, but got \[0\.0, 0\.0\]; write e\.g",
            id="without weight",
        ),
        pytest.param(
            {"space": {"hint_weight": [0, 1]}},
            r"^space\.hint_weight must be 0 without finetune\.hints, but got \[0\.0, 1\.0\]; name layers",
            id="weight alone",
        ),
        pytest.param({"finetune": {"augment": ["crp"]}}, r"^finetune\.augment\[0\].*did you mean 'crop'", id="augment"),
    ],
)
def test_wrong_hints_and_augmentations(content: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        make_job({**JOB, **content})
