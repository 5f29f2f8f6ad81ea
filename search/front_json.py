"""Reading `front.json`, without the weight of what writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paretune.errors import JobError

SCHEMA = 1


def read_front(run: Path) -> dict[str, Any]:
    """A run's `front.json`.

    Raises:
        JobError: There is none, it isn't a JSON object, or it has another schema.
    """
    path = run / "front.json"
    if not path.is_file():
        raise JobError("run", "must be a folder with a front.json", run, "name a run folder below results/")
    try:
        data: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise JobError("front.json", "must be JSON", error, "write it again with `paretune resume`") from error
    if not isinstance(data, dict):
        raise JobError(
            "front.json", "must be a JSON object", type(data).__name__, "write it again with `paretune resume`"
        )
    if data.get("schema") != SCHEMA:
        raise JobError("front.json", f"must have schema {SCHEMA}", data.get("schema"), "use the version that wrote it")
    return data
