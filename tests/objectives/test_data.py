"""Splits, how they are loaded, and every way in which data can be wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paretune.errors import JobError
from paretune.objectives.data import Inputs, Split, Splits, StreamSplit, call, load_splits, map_tensors
from paretune.objectives.imports import add_to_path, import_string

X = torch.arange(40, dtype=torch.float32).reshape(10, 4)
Y = torch.arange(10) % 3


class Pairs:
    """A map-style dataset."""

    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index], int(Y[index])


class Items(Pairs):
    """A map-style dataset of any items."""

    def __init__(self, item: Callable[[int], Any]) -> None:
        super().__init__()
        self.item = item

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


def three(value: Any) -> tuple[Any, Any, Any]:
    return value, value, value


SPLITS = [pytest.param(Split(X, Y), id="memory"), pytest.param(StreamSplit(Pairs()), id="stream")]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        pytest.param(torch.ones(2), torch.full((2,), 2.0), id="tensor"),
        pytest.param((torch.ones(2), torch.zeros(1)), (torch.full((2,), 2.0), torch.zeros(1)), id="tuple"),
        pytest.param({"a": torch.ones(1)}, {"a": torch.full((1,), 2.0)}, id="dict"),
    ],
)
def test_map_tensors_keeps_the_structure(inputs: Inputs, expected: Inputs) -> None:
    torch.testing.assert_close(map_tensors(lambda tensor: 2 * tensor, inputs), expected)


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - b


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        pytest.param(nn.Identity(), torch.full((2,), 2.0), id="tensor"),
        pytest.param(Sum(), (torch.full((2,), 3.0), torch.ones(2)), id="tuple"),
        pytest.param(Sum(), {"b": torch.ones(2), "a": torch.full((2,), 3.0)}, id="dict"),
    ],
)
def test_call_passes_inputs_by_their_structure(model: nn.Module, inputs: Inputs) -> None:
    torch.testing.assert_close(call(model, inputs), torch.full((2,), 2.0))


def test_call_refuses_models_with_several_outputs() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(JobError, match="model must return one tensor, but got tuple; wrap it"):
        call(Two(), X)


@pytest.mark.parametrize("split", SPLITS)
def test_batches_in_order(split: Split) -> None:
    batches = list(split.batches(4))
    assert [len(batch.targets) for batch in batches] == [4, 4, 2]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(10))
    assert torch.equal(torch.cat([batch.targets for batch in batches]), Y)
    assert torch.equal(torch.cat([batch.inputs for batch in batches if isinstance(batch.inputs, Tensor)]), X)
    assert len(split) == 10
    assert [len(batch.targets) for batch in split.batches(4, drop_last=True)] == [4, 4]
    assert [len(batch.targets) for batch in split.batches(99, drop_last=True)] == [10]


@pytest.mark.parametrize("split", SPLITS)
def test_shuffling_is_deterministic_and_leaves_the_global_state_alone(split: Split) -> None:
    state = torch.random.get_rng_state()
    orders = [torch.cat([batch.indices for batch in split.batches(3, shuffle_seed=seed)]) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert sorted(orders[2].tolist()) == list(range(10))
    for batch in split.batches(3, shuffle_seed=1):
        assert isinstance(batch.inputs, Tensor)
        assert torch.equal(batch.inputs, X[batch.indices])
        assert torch.equal(batch.targets, Y[batch.indices])


@pytest.mark.parametrize("split", SPLITS)
def test_subsets_keep_the_indices_of_the_whole(split: Split) -> None:
    part = split.subset([7, 3, 5]).subset(torch.tensor([2, 0]))
    assert part.indices.tolist() == [5, 7]
    (batch,) = part.batches(9)
    assert batch.indices.tolist() == [5, 7]
    assert torch.equal(part.targets, Y[[5, 7]])
    assert isinstance(part.inputs, Tensor)
    assert torch.equal(part.inputs, X[[5, 7]])
    assert (len(split.head(4)), len(split.head(99)), len(split.head(0))) == (4, 10, 0)


def test_streams_and_memory_shuffle_alike() -> None:
    for first, second in zip(
        Split(X, Y).batches(3, shuffle_seed=5), StreamSplit(Pairs()).batches(3, shuffle_seed=5), strict=True
    ):
        assert torch.equal(first.indices, second.indices)


@pytest.mark.parametrize("split", SPLITS)
def test_batch_size_must_be_positive(split: Split) -> None:
    with pytest.raises(JobError, match="batch_size must be at least 1, but got 0"):
        split.batches(0)


def test_lengths_must_agree() -> None:
    with pytest.raises(JobError, match=r"as many targets as inputs, but got inputs 'b' \(9, 4\) and targets \(10,\)"):
        Split({"a": X, "b": X[:9]}, Y)


@pytest.mark.parametrize(
    "result",
    [
        pytest.param(Splits(*three(Split(X, Y))), id="Splits"),
        pytest.param(three((X, Y)), id="tuple of torch pairs"),
        pytest.param(three((X.double().numpy(), Y.to(torch.uint8).numpy())), id="numpy"),
        pytest.param(dict(zip(("train", "validation", "test"), three((X, Y)), strict=True)), id="dict"),
        pytest.param(dict(zip(("train", "val", "test"), three((X, Y.tolist())), strict=True)), id="dict with val"),
        pytest.param(three(Pairs()), id="datasets"),
        pytest.param([Split(X, Y), (X, Y), torch.utils.data.TensorDataset(X, Y)], id="mixed"),
    ],
)
def test_what_a_function_may_return(result: Any) -> None:
    splits = load_splits(lambda: result)
    for split in (splits.train, splits.validation, splits.test):
        assert isinstance(split.inputs, Tensor)
        assert torch.equal(split.inputs, X)
        assert torch.equal(split.targets, Y)
        assert (split.inputs.dtype, split.targets.dtype) == (torch.float32, torch.int64)
    assert splits.augment is None


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        pytest.param(lambda i: ((X[i], X[i]), 1), tuple, id="tuple"),
        pytest.param(lambda i: ({"a": X[i].numpy(), "b": i}, 1.5), dict, id="dict"),
    ],
)
def test_datasets_of_structured_inputs(item: Callable[[int], Any], kind: type) -> None:
    for limit in (0, 2**20):
        train = load_splits(lambda: three(Items(item)), memory_limit_bytes=limit).train
        assert type(train.inputs) is kind
        assert type(train) is (StreamSplit if limit == 0 else Split)
    assert train.targets.dtype == (torch.int64 if kind is tuple else torch.float32)


@pytest.mark.parametrize(("limit", "kind"), [(10 * (4 * 4 + 8), Split), (10 * (4 * 4 + 8) - 1, StreamSplit)])
def test_datasets_are_streamed_by_their_size(limit: int, kind: type) -> None:
    splits = load_splits(lambda: three(Pairs()), memory_limit_bytes=limit)
    assert type(splits.train) is kind
    assert torch.equal(splits.train.targets, Y)


def nan_at(row: int) -> Tensor:
    values = X.clone()
    values[row, 0] = torch.nan
    return values


@pytest.mark.parametrize(
    ("result", "message"),
    [
        pytest.param(three((X[:0], Y[:0])), "must give a train split with samples, but got 0 samples", id="empty"),
        pytest.param(three(Pairs(0)), "must give splits with samples, but got an empty dataset", id="empty dataset"),
        pytest.param(three((X, Y[:5])), "must give as many targets as inputs", id="lengths"),
        pytest.param(three((X[0, 0], Y)), "must give as many targets as inputs", id="scalar inputs"),
        pytest.param(
            ((X, Y), (nan_at(3), Y), (X, Y)),
            "finite inputs in its validation split, but got NaN or infinity in 1 of 10.*first in sample 3",
            id="NaN",
        ),
        pytest.param(
            ((X, Y), (X, Y), ({"a": X / 0}, Y)),
            "finite inputs 'a' in its test split.*in 10 of 10",
            id="infinite",
        ),
        pytest.param(three((X, nan_at(2)[:, 0])), "finite targets in its train split.*sample 2", id="NaN target"),
        pytest.param(three(Items(lambda i: (nan_at(9)[i], 1))), "finite inputs.*sample 9", id="NaN in dataset"),
        pytest.param(
            ((X, Y), (X[:, :3], Y), (X, Y)),
            r"same structure as the train split, Tensor\(float32\[4\]\) -> int64\[\], "
            r"but got Tensor\(float32\[3\]\) -> int64\[\]",
            id="shapes",
        ),
        pytest.param(((X, Y), (X, Y), ((X,), Y)), "test split of the same structure", id="kinds"),
        pytest.param(((X, Y), (X, Y), (X, Y.float())), "test split of the same structure", id="types"),
        pytest.param((X, Y), "must return Splits, or train, validation and test.*but got a tuple of 2", id="two"),
        pytest.param({"train": (X, Y)}, "must return Splits.*but got a dict with 'train'", id="keys"),
        pytest.param(None, "must return Splits.*but got NoneType", id="None"),
        pytest.param(three(iter([1])), r"a train split as \(inputs, targets\).*but got list_iterator", id="iterator"),
        pytest.param(three((["a"], Y)), "must give inputs as a tensor, or a tuple or dictionary", id="texts"),
        pytest.param(three(Items(lambda i: X[i])), r"datasets of \(inputs, target\) items, but got Tensor", id="items"),
        pytest.param(three(Items(lambda i: (object(), 1))), "samples that stack into a batch", id="objects"),
        pytest.param(
            three(Items(lambda i: (X[0, : 1 + i % 2], 1))),
            "samples that stack into a batch",
            id="ragged dataset",
        ),
        pytest.param(three(Items(lambda i: (torch.rand(2), 1))), "same sample at every read.*augment", id="random"),
        pytest.param(Splits(X, X, X), "the train split as a Split, but got Tensor", id="no Split"),  # type: ignore[arg-type]
    ],
)
def test_wrong_data(result: Any, message: str) -> None:
    with pytest.raises(JobError, match=rf"^data\.source .*{message}"):
        load_splits(lambda: result)


def test_streams_are_probed_for_nan() -> None:
    with pytest.raises(JobError, match=r"finite inputs.*first in sample 0"):
        load_splits(lambda: three(Items(lambda i: (X[i] * torch.inf, 1))), memory_limit_bytes=0)


def load_named(size: int, *, seed: int = 0) -> Any:
    return three((X[:size], Y[:size]))


@pytest.mark.parametrize(
    ("source", "args", "message"),
    [
        pytest.param("digit", {}, r"data\.source must be a built-in name.*did you mean 'digits'\?", id="built-in"),
        pytest.param("digits", {"sed": 1}, r"data\.args must.*'sed'; did you mean 'seed'\?", id="argument of built-in"),
        pytest.param(load_named, {}, r"data\.args must hold the required parameter 'size'", id="missing argument"),
        pytest.param(load_named, {"size": 3, "sed": 1}, r"did you mean 'seed'\?", id="unknown argument"),
        pytest.param(load_named, {"size": "a"}, r"data must load.*load_named\(\), but got TypeError", id="raises"),
        pytest.param("no such:thing", {}, r"data\.source must be an import string", id="syntax"),
        pytest.param("paretune_nowhere:x", {}, r"'paretune_nowhere', which doesn't exist", id="module"),
        pytest.param("paretune.objektives:x", {}, r"did you mean 'objectives'\?", id="submodule"),
        pytest.param(
            "paretune.errors:JobErro", {}, r"defines, but got 'JobErro'; did you mean 'JobError'\?", id="name"
        ),
        pytest.param("math:pi", {}, r"data\.source must name a function, but got 'math:pi', a float", id="no function"),
        pytest.param(
            Splits(*three(Split(X, Y))), {"a": 1}, r"data\.args must be empty for splits", id="args of splits"
        ),
    ],
)
def test_wrong_sources(source: Any, args: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        load_splits(source, args)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path for modules; what is imported from it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    add_to_path([tmp_path])
    return tmp_path


def test_import_strings_of_functions_and_splits(modules: Path) -> None:
    (modules / "user_data.py").write_text(
        "import torch\nfrom paretune.objectives.data import Split, Splits\n"
        "part = Split(torch.ones(3, 2), torch.zeros(3).long())\nready = Splits(part, part, part)\n"
        "class Box:\n    @staticmethod\n    def load(n):\n        return ready if n == 3 else None\n"
    )
    assert len(load_splits("user_data:ready").train) == 3
    assert len(load_splits("user_data:Box.load", {"n": 3}).train) == 3


@pytest.mark.parametrize(
    ("code", "message"),
    [
        pytest.param("1 / 0", "imports without an error.*ZeroDivisionError", id="exception"),
        pytest.param(
            "import paretune_nowhere",
            "imports without an error.*No module named 'paretune_nowhere'",
            id="import",
        ),
        pytest.param("raise SystemExit(2)", "imports without an error.*SystemExit: 2", id="exit"),
        pytest.param("x = (", "imports without an error.*SyntaxError", id="syntax"),
    ],
)
def test_modules_that_fail_keep_their_cause(modules: Path, code: str, message: str) -> None:
    (modules / "user_broken.py").write_text(code)
    with pytest.raises(JobError, match=message) as caught:
        import_string("user_broken:x", where="data.source")
    assert caught.value.__cause__ is not None


def test_a_namesake_of_another_folder_is_refused(modules: Path) -> None:
    for name in ("one", "two"):
        (modules / name).mkdir()
        (modules / name / "user_project.py").write_text(f"x = {name!r}")
    add_to_path([modules / "one"])
    assert import_string("user_project:x", where="data.source") == "one"
    add_to_path([modules / "two"])
    with pytest.raises(JobError, match=r"must name the module 'user_project' that is found first.*another process"):
        import_string("user_project:x", where="data.source")
