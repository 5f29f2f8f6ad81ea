"""What several test files share: one thread, the digits, one trained model and its evaluated problem."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paretune.objectives.data import Splits
from paretune.objectives.data.builtin import digits
from paretune.objectives.finetune import Training, TrainOptions, fit
from paretune.objectives.tasks import Classification
from paretune.spaces.plan import Finetuning
from tests.nets import PlainCNN

torch.set_num_threads(1)


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
        options = TrainOptions(batch_size=64, precision="float32", channels_last=False)
        training = Training(digit_splits, Classification(), options)
        total = training.steps(4)
        fit(model, training, Finetuning(learning_rate=5e-3), training.batches(0), range(total), total)
    return model
