"""`paretune init`, and the schema and template that it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from paretune.errors import JobError
from paretune.objectives.data import load_splits
from paretune.objectives.imports import import_string
from paretune.objectives.models import ModelSource
from paretune.search.init import init_project
from paretune.search.job import Job, job_schema, load_job


def test_schema_describes_every_key_and_accepts_the_template(tmp_path: Path) -> None:
    schema = job_schema()
    for name, field in Job.model_fields.items():
        assert schema["properties"][name].get("description"), name
        sub_fields = getattr(field.annotation, "model_fields", {})
        assert all(sub.description for sub in sub_fields.values()), name
    jsonschema = pytest.importorskip("jsonschema")
    init_project(tmp_path)
    content = yaml.safe_load((tmp_path / "job.yaml").read_text().replace("1e-", "1.0e-"))
    jsonschema.validate(content, schema)
    jsonschema.validate({**content, "data": "digits"}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**content, "sarch": {}}, schema)


def test_init_writes_a_job_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "project", raising=False)
    folder = tmp_path / "new" / "job"
    assert [path.name for path in init_project(folder)] == ["job.yaml", "project.py", "job.schema.json"]
    assert json.loads((folder / "job.schema.json").read_text()) == job_schema()
    job = load_job(folder / "job.yaml")
    job.add_python_path()
    source = ModelSource(job.model.factory, job.model.args, job.model.weights)
    with pytest.raises(JobError, match=r"model\.weights must be a file.*train and save the model first"):
        source.build()
    assert job.model.weights == folder / "weights.safetensors"
    assert import_string("project:train", where="test")(job.model.weights, epochs=2) > 0.3
    splits = load_splits(job.data.source, job.data.args)
    batch = next(splits.validation.batches(8))
    inputs = batch.inputs
    assert source.build()(inputs).shape == (8, 10)
    monkeypatch.delitem(sys.modules, "project")


def test_the_template_shows_every_default(tmp_path: Path) -> None:
    init_project(tmp_path)
    explicit = load_job(tmp_path / "job.yaml")
    text = (tmp_path / "job.yaml").read_text()
    assert set(yaml.safe_load(text)) == set(Job.model_fields)
    minimal = "name: digits\nmodel: {factory: 'project:build', weights: weights.safetensors}\ndata: project:data\n"
    (tmp_path / "minimal.yaml").write_text(minimal)
    assert load_job(tmp_path / "minimal.yaml").model_dump() == explicit.model_dump()
    content = yaml.safe_load(text)
    for name in ("model", "data", "space", "finetune", "target", "search", "ray", "verify"):
        annotation: Any = Job.model_fields[name].annotation
        assert set(content[name]) == set(annotation.model_fields)


@pytest.mark.parametrize("name", ["job.yaml", "project.py", "job.schema.json"])
def test_init_overwrites_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(JobError, match=f"must not hold the files of a job yet.*{name}"):
        init_project(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_init_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="folder must be one that can be written"):
        init_project(tmp_path / "file")
