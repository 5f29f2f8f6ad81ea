"""Runtimes by name."""

from __future__ import annotations

import pytest

from paretune.errors import JobError
from paretune.objectives.runtimes import RUNTIMES, Runtime, get_runtime


@pytest.mark.parametrize("name", sorted(RUNTIMES))
def test_known_names(name: str) -> None:
    assert isinstance(get_runtime(name), Runtime)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        pytest.param("openvinno", "did you mean 'openvino'?", id="a typo"),
        pytest.param("abacus", "choose one of", id="nothing near"),
        pytest.param("", "choose one of", id="empty"),
    ],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(JobError) as caught:
        get_runtime(name)
    assert caught.value.where == "target.runtime"
    assert hint in caught.value.remedy
