"""What was measured of this machine once and holds for every job: JSON files in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/paretune``, or ``~/.cache/paretune``; it needn't exist."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "paretune"


def recall(name: str, key: Mapping[str, Any], read: Callable[[Any], T]) -> T | None:
    """What was stored under that key, or None.

    A file that is torn, of another version or not ours at all counts as none: what it held can be measured again.

    Args:
        name: First part of the file's name.
        key: JSON-able values that say what the measurement holds for.
        read: Makes the record of the JSON values; what it raises on foreign ones means that there is none.
    """
    try:
        stored = json.loads(_path(name, key).read_text(encoding="utf-8"))
        return read(stored["value"]) if stored["key"] == _plain(key) else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def store(name: str, key: Mapping[str, Any], value: Any) -> None:
    """Keep JSON-able values for `recall`; readers see the old file or the new one, never a part.

    Where the folder can't be written (a read-only home), nothing is kept and the next one measures again.
    """
    path = _path(name, key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as folder:
            unfinished = Path(folder) / path.name
            unfinished.write_text(json.dumps({"key": key, "value": value}, indent=1) + "\n", encoding="utf-8")
            unfinished.replace(path)
    except OSError:
        return


def _path(name: str, key: Mapping[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{name}-{digest[:16]}.json"


def _plain(key: Mapping[str, Any]) -> Any:
    """The key as JSON gives it back: tuples as lists."""
    return json.loads(json.dumps(key))
