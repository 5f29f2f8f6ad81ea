"""Temporary folders go with their process, however it ends."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from paretune.search.cluster.scratch import scratch, sweep

CODE = """
import os, sys
from paretune.search.cluster.scratch import scratch
folder = scratch("test")
(folder / "file").touch()
print(folder, flush=True)
if sys.argv[1] == "killed":
    os._exit(9)
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.mark.parametrize("end", ["well", "killed"])
def test_goes_with_its_process(end: str) -> None:
    ours = scratch("ours")
    done = subprocess.run([sys.executable, "-c", CODE, end], stdout=subprocess.PIPE, text=True, check=False)
    theirs = Path(done.stdout.strip())
    assert theirs.parent == ours.parent
    assert theirs.exists() == (end == "killed")
    sweep()
    assert not theirs.exists()
    assert ours.is_dir()
