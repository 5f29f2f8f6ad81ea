"""What several test files share: one thread, the digits, one trained model and its evaluated problem."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from paretune.objectives.baseline import Baseline, make_baseline
from paretune.objectives.data import Splits
from paretune.objectives.data.builtin import digits
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.finetune import Training, TrainOptions, fit
from paretune.objectives.models import ModelSource
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import Target
from paretune.objectives.tasks import Classification
from paretune.spaces.plan import Finetuning
from tests.nets import PlainCNN

pytest.register_assert_rewrite("tests.objectives.runtimes.contract", "tests.objectives.compress.contract")
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is probed of this machine is remembered for the tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def digit_splits() -> Splits:
    """Scikit-learn's digits; don't change them in place."""
    return digits()


@pytest.fixture(scope="session")
def trained(digit_splits: Splits) -> nn.Module:
    """A `PlainCNN` that reads most digits; copy it before changing it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PlainCNN()
        options = TrainOptions(batch_size=64, device="cpu", precision="float32", channels_last=False)
        training = Training(digit_splits, Classification(), options)
        total = training.steps(4)
        fit(model, training, Finetuning(learning_rate=5e-3), training.batches(0), range(total), total)
    return model


@pytest.fixture(scope="session")
def problem(trained: nn.Module, digit_splits: Splits, tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """The digits on OpenVINO in batches of 8, with half an epoch of fine-tuning."""
    weights = tmp_path_factory.mktemp("model") / "weights.safetensors"
    save_file(trained.state_dict(), weights)
    return Problem(
        model=ModelSource("tests.nets:PlainCNN", weights=weights),
        splits=digit_splits,
        task=Classification(),
        target=Target("openvino", batch_size=8),
        training=TrainOptions(epochs=0.5, batch_size=64, device="cpu", precision="float32"),
    )


@pytest.fixture(scope="session")
def baseline(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    """The dense model's artifact in float32."""
    return make_baseline(problem, problem.analyse(), tmp_path_factory.mktemp("run") / "baseline", float_bits=(32,))


@pytest.fixture(scope="session")
def evaluator(problem: Problem, baseline: Baseline) -> Evaluator:
    """Ready to evaluate plans."""
    return Evaluator(problem, baseline)
