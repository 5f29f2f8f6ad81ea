"""What every technique must do to every net of the zoo (`tests.nets.ZOO`).

A new technique subclasses `TechniqueContract`, says what it is to be asked for, and what must hold afterwards. Run as a
program, this module replays plans that were saved in a folder: a new process knows them from nothing else.

    python -m tests.objectives.compress.contract FOLDER
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from paretune.errors import ParetuneError
from paretune.objectives.compress import (
    Context,
    compress_numerics,
    compress_structure,
    freeze_quantizers,
    resolve_plan,
)
from paretune.objectives.compress.ties import ties
from paretune.objectives.data import Inputs, Split, Splits, call
from paretune.objectives.finetune import Training, TrainOptions, fit
from paretune.objectives.runtimes import LoadOptions, get_runtime
from paretune.objectives.runtimes.onnx_export import named_arrays
from paretune.objectives.tasks import Classification
from paretune.spaces.analysis import Analysis, analyse
from paretune.spaces.graph import DependencyGraph, Group
from paretune.spaces.grid import channel_grid
from paretune.spaces.plan import CompressionPlan, Finetuning
from tests.nets import ZOO

SAMPLES = 200
BATCH = 50
STEPS = 3
"""Of each fine-tuning: enough to move every weight."""

_OPTIONS = TrainOptions(batch_size=BATCH, device="cpu", precision="float32", channels_last=False)


@dataclass(frozen=True)
class Subject:
    """A net of the zoo that tells some classes apart, and what techniques may look at.

    Attributes:
        name: In the zoo.
        model: The dense net; copy it before changing it.
        split: What it was trained on.
        analysis: What can be pruned.
        context: With batches.
    """

    name: str
    model: nn.Module
    split: Split
    analysis: Analysis
    context: Context

    def train(self, model: nn.Module, plan: CompressionPlan, steps: int = STEPS, rate: float = 1e-2) -> None:
        """Train a model of this net, kept to what the plan ties."""
        training = Training(Splits(self.split, self.split, self.split), Classification(), _OPTIONS)
        config = Finetuning(learning_rate=rate)
        fit(model, training, config, training.batches(0), range(steps), steps, ties=ties(model, plan))


class Zoo:
    """The zoo's nets, each trained when it is first asked for, and the contracts' workshops."""

    def __init__(self) -> None:
        self._subjects: dict[str, Subject] = {}
        self._workshops: dict[type[TechniqueContract], Workshop] = {}

    def __getitem__(self, name: str) -> Subject:
        if name not in self._subjects:
            self._subjects[name] = _subject(name)
        return self._subjects[name]

    def workshop(self, contract: TechniqueContract, folders: pytest.TempPathFactory) -> Workshop:
        """Where a contract's cases are made."""
        kind = type(contract)
        if kind not in self._workshops:
            self._workshops[kind] = Workshop(contract, self, folders.mktemp(kind.__name__))
        return self._workshops[kind]


def _subject(name: str) -> Subject:
    build, inputs = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        given = inputs(SAMPLES)
        # Its own features, centred, say the classes: an untrained net gives nearly all samples the same one.
        with torch.no_grad():
            outputs = call(model, given)
        split = Split(given, (outputs - outputs.mean(0)).argmax(1))
        analysis = analyse(model, lambda module: call(module, inputs(2)))
        context = Context(
            example=inputs(2),
            channels={group.name: group.channels for group in _groups(copy.deepcopy(model), inputs(2))},
            task=Classification(),
            batches=list(split.batches(BATCH)),
            schemes=get_runtime("openvino").capabilities("cpu").schemes,
            grids={group.name: channel_grid(group.channels, unit=group.unit) for group in analysis.groups},
            units={group.name: group.unit for group in analysis.groups},
        )
        subject = Subject(name, model, split, analysis, context)
        subject.train(model, CompressionPlan(), steps=40)
    return subject


def _groups(model: nn.Module, example: Inputs) -> list[Group]:
    """All groups of a model, which may be rewritten on the way."""
    return list(DependencyGraph(model, lambda module: call(module, example)).groups())


Check = Callable[[Subject, CompressionPlan, nn.Module], None]
"""Asserts that a plan's promise holds in a model made from a subject's."""


class Case(NamedTuple):
    """What a technique is asked for.

    Attributes:
        plan: Makes a plan for a net that treats the given groups or layers.
        nets: Names of the nets it is tried on.
    """

    plan: Callable[[Subject, Sequence[str]], CompressionPlan]
    nets: Sequence[str] = tuple(ZOO)


@dataclass(frozen=True)
class Made:
    """What became of a case.

    Attributes:
        plan: Resolved.
        refused: Layers that the technique doesn't treat, with its reason.
        cut: Numbers that weren't zero after each cut of the schedule, with the dense model's before.
        structure: The model after the last cut, untrained since.
        trained: The same, trained.
        module: After the whole way: trained, folded, trained again, frozen.
    """

    plan: CompressionPlan
    refused: dict[str, str]
    cut: list[int]
    structure: nn.Module
    trained: nn.Module
    module: nn.Module


class TechniqueContract:
    """Subclass it as `Test<Technique>`; the subclass's module gives the fixture `zoo`.

    Attributes:
        cases: By name.
        structure: What must hold from the last cut on.
        numerics: What must hold in what is deployed, besides.
    """

    cases: ClassVar[dict[str, Case]]
    structure: ClassVar[Sequence[Check]] = ()
    numerics: ClassVar[Sequence[Check]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Every test of a case and a net runs for all of them."""
        if {"case", "net"} <= set(metafunc.fixturenames):
            pairs = [(case, net) for case, found in self.cases.items() for net in found.nets]
            metafunc.parametrize(("case", "net"), pairs, ids=[f"{case}-{net}" for case, net in pairs])

    @pytest.fixture
    def workshop(self, zoo: Zoo, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
        return zoo.workshop(self, tmp_path_factory)

    def names(self, subject: Subject) -> list[str]:
        """All that the technique is asked to treat: every layer."""
        return [layer.name for layer in subject.analysis.layers]

    def test_the_plan_is_resolved(self, workshop: Workshop, case: str, net: str) -> None:
        made = workshop.make(case, net)
        assert made.plan.is_resolved
        assert CompressionPlan.from_json(made.plan.to_json()) == made.plan

    def test_what_cant_be_treated_is_named_with_its_reason(self, workshop: Workshop, case: str, net: str) -> None:
        made, names = workshop.make(case, net), self.names(workshop.zoo[net])
        assert all(len(reason) > len(name) + 10 for name, reason in made.refused.items())
        assert len(made.refused) < len(names), "nothing is left to treat"

    def test_structure_is_as_promised(self, workshop: Workshop, case: str, net: str) -> None:
        made, subject = workshop.make(case, net), workshop.zoo[net]
        for check in self.structure:
            check(subject, made.plan, made.structure)
        _check_outputs(subject, made.structure)

    def test_each_cut_goes_further(self, workshop: Workshop, case: str, net: str) -> None:
        made = workshop.make(case, net)
        assert len(made.cut) == 1 + made.plan.schedule.steps
        assert made.cut == sorted(made.cut, reverse=True)
        assert (made.cut[-1] < made.cut[0]) == bool(self.structure), "numerics remove nothing"

    def test_training_keeps_the_promise(self, workshop: Workshop, case: str, net: str) -> None:
        made, subject = workshop.make(case, net), workshop.zoo[net]
        pairs = zip(made.structure.parameters(), made.trained.parameters(), strict=True)
        assert not all(torch.equal(before, after) for before, after in pairs), "the training did something"
        for check in self.structure:
            check(subject, made.plan, made.trained)
        for check in (*self.structure, *self.numerics):
            check(subject, made.plan, made.module)
        _check_outputs(subject, made.module)

    def test_folding_changes_nothing(self, workshop: Workshop, case: str, net: str) -> None:
        made, subject = workshop.make(case, net), workshop.zoo[net]
        folded = compress_numerics(made.trained, CompressionPlan(), subject.context)
        with torch.no_grad():
            expected, found = call(made.trained.eval(), subject.split.inputs), call(folded, subject.split.inputs)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))

    def test_a_new_process_replays_it(
        self, request: pytest.FixtureRequest, workshop: Workshop, case: str, net: str
    ) -> None:
        name, kind = request.function.__name__, type(self)
        items = [item for item in request.session.items if isinstance(item, pytest.Function)]
        wanted = [item.callspec.params for item in items if item.cls is kind and item.originalname == name]
        found = workshop.replayed([(str(params["case"]), str(params["net"])) for params in wanted])
        assert found[f"{case}-{net}"] == "same"

    def test_the_artifact_agrees(self, workshop: Workshop, tmp_path: Path, case: str, net: str) -> None:
        made, subject = workshop.make(case, net), workshop.zoo[net]
        quantized = any(bits <= 8 for bits in made.plan.quantize.bits.values())
        check_artifact(made.module, subject, tmp_path / "model.onnx", quantized=quantized)


class Workshop:
    """Makes the cases of a contract, each once.

    Args:
        contract: Gives the cases.
        zoo: Gives the nets.
        folder: Where they are saved.
    """

    def __init__(self, contract: TechniqueContract, zoo: Zoo, folder: Path) -> None:
        self.zoo = zoo
        self._contract = contract
        self._folder = folder
        self._made: dict[tuple[str, str], Made] = {}
        self._replayed: dict[str, str] = {}

    def make(self, case: str, net: str) -> Made:
        """The case on that net."""
        if (case, net) not in self._made:
            subject = self.zoo[net]
            plan, refused = accepted(subject, self._contract.cases[case].plan, self._contract.names(subject))
            self._made[case, net] = make(subject, plan, refused)
        return self._made[case, net]

    def replayed(self, wanted: Sequence[tuple[str, str]]) -> dict[str, str]:
        """What a new process, one for all cases and nets, finds of each: ``same``, or what is wrong."""
        if not self._replayed:
            for case, net in wanted:
                save(self._folder / f"{case}-{net}", self.zoo[net], self.make(case, net))
            command = [sys.executable, "-m", __name__, str(self._folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            self._replayed = json.loads(done.stdout.splitlines()[-1])
        return self._replayed


def make(subject: Subject, plan: CompressionPlan, refused: dict[str, str] | None = None) -> Made:
    """Take a resolved plan the whole way, as a trial does, with a few steps of training after each cut."""
    torch.manual_seed(0)
    model = copy.deepcopy(subject.model)
    cut = [_nonzero(model)]
    fractions = plan.schedule.fractions
    for fraction in fractions:
        model = compress_structure(model, plan, subject.context, fraction)
        cut.append(_nonzero(model))
        if fraction != fractions[-1]:
            subject.train(model, plan)
    structure = copy.deepcopy(model)
    subject.train(model, plan)
    module = compress_numerics(model, plan, subject.context)
    if plan.quantize.aware:
        subject.train(module, plan)
    freeze_quantizers(module)
    return Made(plan, refused or {}, cut, structure, model, module.eval())


def accepted(
    subject: Subject, ask: Callable[[Subject, Sequence[str]], CompressionPlan], names: Sequence[str]
) -> tuple[CompressionPlan, dict[str, str]]:
    """The resolved plan without the layers that are refused, and the reasons why they are."""
    refused: dict[str, str] = {}
    while True:
        treated = [name for name in names if name not in refused]
        plan = resolve_plan(copy.deepcopy(subject.model), ask(subject, treated), subject.context)
        error = _refusal(subject, plan)
        if error is None:
            return plan, refused
        named = [name for name in treated if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.]*\w)", str(error))]
        assert named, f"a refusal must name a layer, but got {error}"
        refused[named[0]] = str(error)


def _refusal(subject: Subject, plan: CompressionPlan) -> ParetuneError | None:
    try:
        model = compress_structure(copy.deepcopy(subject.model), plan, subject.context)
        compress_numerics(model, plan, subject.context)
    except ParetuneError as error:
        return error
    return None


def _nonzero(model: nn.Module) -> int:
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


def _check_outputs(subject: Subject, model: nn.Module) -> None:
    """Forward and backward run, and give finite numbers of the dense model's shape."""
    example = subject.context.example
    model = copy.deepcopy(model).train()
    outputs = call(model, example)
    assert outputs.shape == call(subject.model, example).shape
    assert bool(outputs.isfinite().all())
    torch.autograd.backward(Classification().loss(outputs, subject.split.targets[: len(outputs)]))
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@torch.no_grad()
def check_artifact(module: nn.Module, subject: Subject, path: Path, *, quantized: bool) -> None:
    """Assert that OpenVINO computes what the module does."""
    runtime = get_runtime("openvino")
    runtime.deploy(module, subject.context.example, path)
    found = runtime.load(path, LoadOptions(SAMPLES, purpose="score")).run(named_arrays(subject.split.inputs))
    expected = call(module, subject.split.inputs).numpy()
    assert found.shape == expected.shape
    if quantized:
        assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.995
    else:
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@torch.no_grad()
def save(folder: Path, subject: Subject, made: Made) -> None:
    """Write what a new process needs to replay a plan, and the outputs that it must find."""
    folder.mkdir()
    (folder / "plan.json").write_text(made.plan.to_json())
    (folder / "facts.json").write_text(
        json.dumps({"net": subject.name, "channels": subject.context.channels, "grids": dict(subject.context.grids)})
    )
    save_model(made.module, str(folder / "weights.safetensors"))
    save_file({"outputs": call(made.module, ZOO[subject.name][1](SAMPLES))}, folder / "outputs.safetensors")


@torch.no_grad()
def replay(folder: Path) -> str:
    """Make a saved model again: ``same`` where it gives the same outputs bit for bit, or what is wrong."""
    facts = json.loads((folder / "facts.json").read_text())
    plan = CompressionPlan.from_json((folder / "plan.json").read_text())
    build, inputs = ZOO[facts["net"]]
    schemes = get_runtime("openvino").capabilities("cpu").schemes
    context = Context(inputs(2), facts["channels"], Classification(), [], schemes, facts["grids"])
    torch.manual_seed(1)  # other weights than were compressed
    module = compress_numerics(compress_structure(build().eval(), plan, context), plan, context)
    load_model(module, folder / "weights.safetensors")
    found, expected = call(module.eval(), inputs(SAMPLES)), load_file(folder / "outputs.safetensors")["outputs"]
    return "same" if torch.equal(found, expected) else f"differs by {float((found - expected).abs().max()):.2g}"


def main(folder: Path) -> None:
    """Print what became of each model of a folder, as JSON."""
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps({saved.name: _told(saved) for saved in folder.iterdir()}) + "\n")


def _told(saved: Path) -> str:
    try:
        return replay(saved)
    except Exception as error:  # the other models' results are wanted all the same
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
