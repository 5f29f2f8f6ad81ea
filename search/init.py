"""`paretune init`: a job that works, for the user to change."""

from __future__ import annotations

import json
from pathlib import Path

from paretune.errors import JobError
from paretune.search.job import job_schema

_TEMPLATES = ("job.yaml", "project.py")
_SCHEMA = "job.schema.json"


def init_project(folder: Path) -> list[Path]:
    """Write a commented ``job.yaml``, a ``project.py`` with a model and data, and the schema for editors.

    Args:
        folder: Made where it doesn't exist.

    Returns:
        The files written.

    Raises:
        JobError: One of the files is there already (then nothing is written), or the folder can't be written.
    """
    source = Path(__file__).parent / "templates"
    contents = {name: (source / name).read_text(encoding="utf-8") for name in _TEMPLATES}
    contents[_SCHEMA] = json.dumps(job_schema(), indent=2) + "\n"
    for name in contents:
        if (folder / name).exists():
            remedy = "give another folder, or move the file away: nothing is ever overwritten"
            raise JobError("folder", "must not hold the files of a job yet", folder / name, remedy)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            with (folder / name).open("x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise JobError("folder", "must be one that can be written", f"{folder} ({error})", "give another") from error
    return [folder / name for name in contents]
