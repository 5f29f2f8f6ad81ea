"""The wheel is complete and collides with nobody; pyproject.toml, constraints.txt and the disk agree.

Everything is built from a copy of the checkout, so that the builds leave nothing in it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("objectives", "search", "spaces")
# The folders whose files the wheel must hold, and where in it.
PLACES = {"paretune": "paretune", **{room: f"paretune/{room}" for room in ROOMS}}
NOT_SOURCE = ("__pycache__", ".venv", ".git", "build", "dist", "results")


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def source_files() -> list[Path]:
    """What a commit of the checkout would hold, relative to it; without git, all but what is never source."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        found = [path for path in ROOT.rglob("*") if path.is_symlink() or path.is_file()]
    else:
        found = [ROOT / name for name in sorted(set(listing.split("\0")) - {""})]
    relative = [path.relative_to(ROOT) for path in found if path.is_symlink() or path.is_file()]
    return [path for path in relative if not any(part in NOT_SOURCE for part in path.parts)]


def expected_files() -> set[str]:
    """Every file of the rooms and of `paretune/` (less its links), under the name it must have in a wheel."""
    return {
        "/".join((PLACES[path.parts[0]], *path.parts[1:]))
        for path in source_files()
        if path.parts[0] in PLACES and not (ROOT / path).is_symlink()
    }


def build(source: Path, out: Path, *options: str) -> Path:
    """Run `python -m build` without a network and return the wheel."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(out), str(source)],
        cwd=out.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, without its dist-info folder (which holds times and hashes)."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy") / "checkout"
    for path in source_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path, follow_symlinks=False)
    return folder


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(copy, tmp_path_factory.mktemp("wheel") / "out", "--wheel")


def test_wheel_has_one_top_level(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"paretune"}
    assert len(tops) == 2


def test_wheel_holds_every_file_of_the_rooms(wheel: Path) -> None:
    expected = expected_files()
    assert {"paretune/py.typed", "paretune/spaces/plan.py", "paretune/search/__init__.py"} <= expected
    assert set(contents(wheel)) == expected


def test_wheel_carries_license_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        extras = {name.split(".dist-info/")[1]: name for name in archive.namelist() if ".dist-info/" in name}
        assert "licenses/LICENSE" in extras
        assert "paretune = paretune.cli:main" in archive.read(extras["entry_points.txt"]).decode()


def test_sdist_builds_the_same_wheel(copy: Path, wheel: Path, tmp_path: Path) -> None:
    # Without a choice, `build` makes the sdist and then the wheel from that sdist alone.
    again = build(copy, tmp_path / "out")
    assert list((tmp_path / "out").glob("*.tar.gz"))
    assert contents(again) == contents(wheel)


def test_wheel_imports_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(elsewhere)
    names = ["paretune", *(f"paretune.{room}" for room in ROOMS), "paretune.spaces.plan"]
    # An editable install in this environment would stand in for what the wheel lacks: its finder goes.
    program = f"""
import importlib, json, sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
sys.path.insert(0, {str(elsewhere)!r})
print(json.dumps({{name: importlib.import_module(name).__file__ for name in {names!r}}}))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, check=False, text=True
    )
    assert done.returncode == 0, done.stderr
    files: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    assert list(files) == names
    strays = {name: file for name, file in files.items() if not Path(file).is_relative_to(elsewhere)}
    assert not strays


def packages_on_disk() -> dict[str, str]:
    """Package name to folder, for every folder of the rooms that holds Python files; templates are data."""
    sources = [path for path in source_files() if path.suffix == ".py" and "templates" not in path.parts]
    folders = {path.parent for path in sources if path.parts[0] in PLACES}
    return {".".join((*PLACES[path.parts[0]].split("/"), *path.parts[1:])): path.as_posix() for path in folders}


def test_every_package_is_listed() -> None:
    setuptools = pyproject()["tool"]["setuptools"]
    assert sorted(setuptools["packages"]) == sorted(packages_on_disk())
    assert setuptools["package-dir"] == packages_on_disk()


def test_every_package_has_an_init() -> None:
    assert [folder for folder in packages_on_disk().values() if not (ROOT / folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("room", ROOMS)
def test_links_lead_to_the_rooms(room: str) -> None:
    link = ROOT / "paretune" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..", room)


def requirements(*names: str) -> dict[str, Requirement]:
    project = pyproject()["project"]
    lists = {"core": project["dependencies"], **project["optional-dependencies"]}
    parsed = [Requirement(text) for name in names for text in lists[name]]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def constraints() -> dict[str, list[Requirement]]:
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            pins.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    return pins


def test_constraints_are_exact_and_unambiguous() -> None:
    for name, pins in constraints().items():
        for pin in pins:
            assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), f"{name}: {pin}"
        for python in ("3.10", "3.11", "3.12", "3.13"):
            environment = {"python_version": python}
            applying = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
            assert len(applying) <= 1, f"{name} on Python {python}: {applying}"


def test_direct_dependencies_are_pinned_within_their_range() -> None:
    pins = constraints()
    for name, requirement in requirements("core", "dev").items():
        if name == "setuptools":  # The build backend: never pinned, isolated builds fetch their own.
            continue
        assert name in pins, f"{name} has no line in constraints.txt"
        for pin in pins[name]:
            (version,) = (specifier.version for specifier in pin.specifier)
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement} excludes {pin}"


def test_every_core_dependency_is_explained() -> None:
    record = (ROOT / "docs/decisions/002-dependencies.md").read_text(encoding="utf-8")
    explained = {canonicalize_name(name) for name in re.findall(r"^\| `([\w.-]+)", record, flags=re.MULTILINE)}
    assert set(requirements("core")) == explained
