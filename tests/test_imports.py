"""Who may import whom, read from the sources; and what the command must not load before it has work to do."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A room may import itself and the rooms named here: search -> objectives -> spaces.
BELOW = {"spaces": set[str](), "objectives": {"spaces"}, "search": {"spaces", "objectives"}}
# What every room may take from the thin package on top. Its public API would be a way back up.
SHARED = {"errors", "__version__"}
HEAVY = {"torch", "optuna", "ray", "openvino"}


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported anywhere in a module, in functions and type checks too.

    `from a import b` yields `a.b`: whether `b` is a module can't be seen from here. A relative import yields
    a name that starts with a dot. `import_module("a")` and `__import__("a")` count as well.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            function = node.func
            called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            first = node.args[0]
            if called in {"import_module", "__import__"} and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def violations(path: str, source: str) -> list[str]:
    """What the module at `path` (relative to the checkout) imports against the rules, as `line: name`."""
    room = path.split("/", 1)[0]
    found = []
    for line, name in imported(ast.parse(source)):
        top, _, rest = name.partition(".")
        if top == "":
            wrong = True
        elif top == "torch_pruning":
            wrong = path != "spaces/graph.py" and not path.startswith("objectives/compress/")
        elif top in BELOW:
            wrong = True
        elif top == "paretune" and room in BELOW:
            wrong = rest.split(".", 1)[0] not in BELOW[room] | SHARED | {room}
        else:
            wrong = False
        if wrong:
            found.append(f"{line}: {name}")
    return found


def modules() -> list[str]:
    folders = [ROOT / room for room in BELOW]
    files = [
        *(ROOT / "paretune").glob("*.py"),
        *(file for folder in folders for file in folder.rglob("*.py")),
    ]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def test_all_rooms_are_read() -> None:
    assert {name.split("/", 1)[0] for name in modules()} == {"paretune", *BELOW}


@pytest.mark.parametrize("path", modules())
def test_imports_point_one_way(path: str) -> None:
    assert violations(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        pytest.param("spaces/a.py", "import paretune.objectives", id="spaces-objectives"),
        pytest.param("spaces/a.py", "from paretune.search.study import Study", id="spaces-search"),
        pytest.param("objectives/a.py", "from paretune import search", id="objectives-search-by-from"),
        pytest.param("objectives/a.py", "def f():\n    import paretune.search.job as job", id="late"),
        pytest.param("objectives/a.py", "if TYPE_CHECKING:\n    from paretune.search import Job", id="typing"),
        pytest.param("objectives/a.py", "importlib.import_module('paretune.search')", id="dynamic"),
        pytest.param("spaces/a.py", "from paretune import run", id="public-api"),
        pytest.param("spaces/a.py", "import paretune", id="whole-package"),
        pytest.param("spaces/a.py", "from paretune.cli import main", id="command"),
        pytest.param("search/a.py", "from . import front", id="relative"),
        pytest.param("search/a.py", "from search.front import Front", id="bare-room"),
        pytest.param("paretune/cli.py", "import search", id="bare-room-on-top"),
        pytest.param("spaces/plan.py", "import torch_pruning as tp", id="torch-pruning-in-spaces"),
        pytest.param("search/a.py", "from torch_pruning import DependencyGraph", id="torch-pruning-in-search"),
        pytest.param("paretune/cli.py", "__import__('torch_pruning.utils')", id="torch-pruning-on-top"),
    ],
)
def test_forbidden_imports_are_seen(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        pytest.param("spaces/graph.py", "import torch_pruning", id="adapter"),
        pytest.param("objectives/compress/prune.py", "from torch_pruning import importance", id="compressor"),
        pytest.param("objectives/a.py", "from paretune.spaces.plan import CompressionPlan", id="down-one"),
        pytest.param("search/a.py", "from paretune import objectives, spaces", id="down-two"),
        pytest.param("spaces/a.py", "from paretune.errors import JobError", id="errors"),
        pytest.param("search/a.py", "from paretune import __version__", id="version"),
        pytest.param("paretune/__init__.py", "from paretune.search import Job", id="top"),
        pytest.param("search/a.py", "import searchlib", id="similar-name"),
    ],
)
def test_allowed_imports_pass(path: str, source: str) -> None:
    assert violations(path, source) == []


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `statement`."""
    program = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=False, text=True)
    assert done.returncode == 0, done.stderr
    names: list[str] = json.loads(done.stdout.splitlines()[-1])
    return set(names)


@pytest.mark.parametrize("module", ["paretune", "paretune.cli"])
def test_heavy_libraries_are_imported_late(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} doesn't exist yet")
    loaded = loaded_by(f"import {module}")
    assert "paretune" in loaded
    assert loaded & HEAVY == set()


def test_a_heavy_library_would_be_seen() -> None:
    assert "optuna" in loaded_by("import optuna")
