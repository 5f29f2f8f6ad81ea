"""Building models from factories, zoos and live objects, and loading weights that fit or don't."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from paretune.errors import JobError
from paretune.objectives.models import ModelSource


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.decoder = nn.Linear(3, 3, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))  # type: ignore[no-any-return]


def build(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2), nn.BatchNorm1d(2), nn.Dropout())


MODULE = nn.Linear(2, 2)


@pytest.mark.parametrize(
    "factory", [pytest.param(build, id="callable"), pytest.param(f"{__name__}:build", id="import string")]
)
def test_factories(factory: Any) -> None:
    model = ModelSource(factory, {"width": 5}).build()
    assert isinstance(model, nn.Sequential)
    assert model[0].in_features == 5
    assert not model.training
    assert not model[2].training


@pytest.mark.parametrize(
    "factory", [pytest.param(MODULE, id="live"), pytest.param(f"{__name__}:MODULE", id="import string")]
)
def test_modules_are_copied(factory: Any) -> None:
    models = [ModelSource(factory).build() for _ in range(2)]
    models[0].load_state_dict({name: torch.zeros_like(value) for name, value in MODULE.state_dict().items()})
    for model in (models[1], MODULE):
        assert model.state_dict()["weight"].abs().sum().item() > 0


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_weights(tmp_path: Path, suffix: str) -> None:
    state = {name: torch.rand_like(value.float()).to(value.dtype) for name, value in build().state_dict().items()}
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    loaded = ModelSource(build, weights=path).build().state_dict()
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    trained = Tied()
    save_model(trained, str(tmp_path / "w.safetensors"))
    model = ModelSource(Tied, weights=tmp_path / "w.safetensors").build()
    assert isinstance(model, Tied)
    assert torch.equal(model.decoder.weight, trained.encoder.weight)
    assert model.decoder.weight is model.encoder.weight


def without(state: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda s: without(s, "0.bias"),
            r"exactly the keys.*but got 1 missing \(0\.bias\); save",
            id="missing",
        ),
        pytest.param(lambda s: {**s, "x": s["0.bias"]}, r"1 unexpected \(x\)", id="unexpected"),
        pytest.param(
            lambda s: {f"module.{name}": value for name, value in s.items()},
            r"7 missing \(0\.weight, 0\.bias, 1\.weight, …\); 7 unexpected \(module\.0\.weight, .*…\)",
            id="prefix",
        ),
        pytest.param(
            lambda s: {**s, "0.weight": torch.ones(4, 3)},
            r"the shapes of the model, \(2, 3\) here.*\(4, 3\)",
            id="shape",
        ),
        pytest.param(lambda s: {**s, "0.bias": torch.full((2,), torch.nan)}, r"must be finite.*0\.bias", id="NaN"),
        pytest.param(lambda s: {"state_dict": s}, r"a state dictionary.*a dict with 'state_dict'", id="nested"),
        pytest.param(lambda s: [1], "a state dictionary, of tensors alone, but got list", id="list"),
        pytest.param(
            lambda s: build(),
            r"must hold tensors alone, but got .*w\.pt with torch\..*Sequential; save model\.state_dict",
            id="pickled model",
        ),
    ],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    torch.save(change(build().state_dict()), tmp_path / "w.pt")
    with pytest.raises(JobError, match=rf"model\.weights .*{message}"):
        ModelSource(build, weights=tmp_path / "w.pt").build()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("w.pt", None, "must be a file, but got .*w.pt, which doesn't exist", id="missing"),
        pytest.param("w.onnx", b"", r"must end in \.safetensors, \.pt or \.pth, but got w\.onnx", id="suffix"),
        pytest.param("w.safetensors", b"abc", "must be a readable file of weights", id="broken safetensors"),
        pytest.param("w.pt", b"", "must be a readable file of weights", id="empty pt"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(JobError, match=rf"model\.weights {message}"):
        ModelSource(build, weights=tmp_path / name).build()


def fails() -> nn.Module:
    raise RuntimeError("no weights here")


@pytest.mark.parametrize(
    ("factory", "args", "message"),
    [
        pytest.param(build, {"widht": 3}, r"model\.args must.*'widht'; did you mean 'width'\?", id="unknown argument"),
        pytest.param(nn.Linear, {"in_features": 3}, "required parameter 'out_features'", id="missing argument"),
        pytest.param(
            fails,
            {},
            r"model must load without an error from fails\(\).*RuntimeError: no weights",
            id="raises",
        ),
        pytest.param(dict, {}, r"model\.factory must return a torch\.nn\.Module, but got dict", id="no module"),
        pytest.param("math:pi", {}, r"model\.factory must be a function.*'math:pi', a float", id="no function"),
        pytest.param(MODULE, {"a": 1}, r"model\.args must be empty for a module", id="arguments of a module"),
        pytest.param(f"{__name__}:biuld", {}, r"model\.factory must name.*did you mean 'build'\?", id="name"),
        pytest.param("build", {}, r"model\.factory must be an import string", id="syntax"),
    ],
)
def test_wrong_factories(factory: Any, args: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        ModelSource(factory, args).build()


@pytest.fixture
def zoos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first on the path, for packages that stand in for the zoos."""
    known = {
        name: module for name, module in sys.modules.items() if name.partition(".")[0] not in ("timm", "torchvision")
    }
    monkeypatch.setattr(sys, "modules", known)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


ZOO = """
import torch
def list_models(): return ["resnet18", "vit_tiny"]
def {create}(name, width=2): return torch.nn.Linear(width, 1)
"""


def write_zoo(folder: Path, zoo: str, text: str) -> None:
    path = folder / "timm" if zoo == "timm" else folder / "torchvision" / "models"
    path.mkdir(parents=True)
    (folder / zoo / "__init__.py").touch()
    (path / "__init__.py").write_text(text)


@pytest.mark.parametrize("zoo", ["timm", "torchvision"])
def test_zoos(zoos: Path, zoo: str) -> None:
    write_zoo(zoos, zoo, ZOO.format(create="create_model" if zoo == "timm" else "get_model"))
    model = ModelSource(f"{zoo}:resnet18", {"width": 4}).build()
    assert isinstance(model, nn.Linear)
    assert model.in_features == 4
    with pytest.raises(JobError, match=rf"must name a model of {zoo}, but got 'resnet81'; did you mean 'resnet18'\?"):
        ModelSource(f"{zoo}:resnet81").build()
    with pytest.raises(JobError, match=rf"must be built without an error by {zoo}.*TypeError.*check model\.args"):
        ModelSource(f"{zoo}:resnet18", {"x": 4}).build()


@pytest.mark.parametrize("zoo", ["timm", "torchvision"])
def test_zoos_that_break(zoos: Path, zoo: str) -> None:
    write_zoo(zoos, zoo, "raise RuntimeError('operator torchvision::nms does not exist')")
    with pytest.raises(
        JobError, match=rf"needs a '{zoo}' that imports, but got RuntimeError: operator.*built for torch"
    ):
        ModelSource(f"{zoo}:resnet18").build()


@pytest.mark.parametrize("zoo", ["timm", "torchvision"])
def test_zoos_that_are_not_installed(zoos: Path, monkeypatch: pytest.MonkeyPatch, zoo: str) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(JobError, match=rf"model\.factory needs the package '{zoo}'.*pip install {zoo}"):
        ModelSource(f"{zoo}:resnet18").build()


def test_zoos_that_lack_a_package(zoos: Path) -> None:
    write_zoo(zoos, "timm", "import paretune_nowhere")
    with pytest.raises(JobError, match=r"needs a 'timm' that imports.*No module named 'paretune_nowhere'"):
        ModelSource("timm:resnet18").build()
