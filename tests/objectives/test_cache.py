"""Measurements of the machine are kept, and what can't be read is measured again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from paretune.objectives.cache import cache_folder, recall, store

KEY = {"runtime": "openvino", "counts": (4, 8)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "paretune"


def test_stored_values_come_back_under_their_key_alone(folder: Path) -> None:
    assert recall("probe", KEY, dict) is None
    store("probe", KEY, {"a": 1})
    assert recall("probe", KEY, dict) == {"a": 1}
    assert recall("probe", KEY | {"runtime": "tensorrt"}, dict) is None
    assert recall("staircase", KEY, dict) is None
    store("probe", KEY, {"a": 2})
    assert recall("probe", KEY, dict) == {"a": 2}
    assert [path.suffix for path in folder.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param('{"key": {"runt', id="torn"),
        pytest.param("\xff\xfe", id="not UTF-8 JSON"),
        pytest.param("[1, 2]", id="a list"),
        pytest.param('{"value": {"a": 1}}', id="no key"),
        pytest.param('{"key": {"runtime": "other"}, "value": {"a": 1}}', id="another key"),
    ],
)
def test_files_that_are_not_ours_count_as_none(folder: Path, text: str) -> None:
    store("probe", KEY, {"a": 1})
    (file,) = folder.iterdir()
    file.write_text(text, encoding="latin-1")
    assert recall("probe", KEY, dict) is None


def test_values_that_make_no_record_count_as_none() -> None:
    def read(value: Any) -> int:
        return int(value["count"])

    store("probe", KEY, {"count": 3})
    assert recall("probe", KEY, read) == 3
    for foreign in ({}, [], {"count": "many"}, {"count": None}):
        store("probe", KEY, foreign)
        assert recall("probe", KEY, read) is None


def test_a_folder_that_cannot_be_written_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    store("probe", KEY, {"a": 1})
    assert recall("probe", KEY, dict) is None


def test_a_relative_folder_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    assert cache_folder() == Path.home() / ".cache" / "paretune"
