"""The finetune section: what it refuses, and that the training knows each of its keys."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from paretune.errors import JobError
from paretune.objectives.training import TrainOptions
from paretune.search.job import load_job
from paretune.search.job_sections import FinetuneSection


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("schedule: onecycle", r"finetune\.schedule must be 'cosine' or 'one-cycle'.*did you mean 'one-cycle'\?"),
        ("label_smoothing: 1", r"finetune\.label_smoothing must be less than 1, but got 1"),
        ("label_smoothing: -0.1", r"finetune\.label_smoothing must be greater than or equal to 0"),
        ("ema: 1.0", r"finetune\.ema must be less than 1, but got 1"),
        ("ema: 0", r"finetune\.ema must be greater than 0, but got 0"),
        ("freeze_batchnorm: 1.5", r"finetune\.freeze_batchnorm must be less than or equal to 1"),
        ("plateau: 0", r"finetune\.plateau must be greater than 0, but got 0"),
        ("plateau: 1", r"finetune\.plateau must be less than 1, but got 1"),
        ("compile: auto", r"finetune\.compile must be a valid boolean, but got 'auto'"),
    ],
)
def test_what_finetune_refuses(tmp_path: Path, section: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(f"name: small\nmodel: {{factory: 'project:build'}}\ndata: digits\nfinetune: {{{section}}}\n")
    with pytest.raises(JobError, match=message):
        load_job(path)


def test_the_training_has_the_same_options_and_defaults() -> None:
    section = FinetuneSection().model_dump()
    assert set(section) == {field.name for field in fields(TrainOptions)}
    ours = TrainOptions()
    assert {name: value for name, value in section.items() if value} == {
        name: value for name, value in vars(ours).items() if value
    }
