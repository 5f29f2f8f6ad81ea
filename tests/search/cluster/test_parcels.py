"""Parcels: what goes in comes out elsewhere, and nothing else does."""

import io
import tarfile
from pathlib import Path

import pytest

from paretune.errors import JobError, SearchError
from paretune.search.cluster.parcels import Parcel, own_storage, pack, pack_files


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    (folder / "deep").mkdir(parents=True)
    (folder / "card.json").write_text("{}")
    (folder / "deep" / "weights").write_bytes(bytes(range(256)))
    return folder


def archive(name: str, kind: bytes = tarfile.REGTYPE) -> Parcel:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    return Parcel(buffer.getvalue())


def test_takes_the_place_of_what_was_there(artifact: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "stale").touch()
    pack(artifact).unpack(there)
    assert sorted(path.name for path in there.rglob("*")) == ["card.json", "deep", "weights"]
    assert (there / "deep" / "weights").read_bytes() == bytes(range(256))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "there"]


def test_merges_only_what_is_named(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    pack(artifact).merge(tmp_path, below="deep/")
    assert (tmp_path / "weights").is_file()
    assert (tmp_path / "kept").is_file()
    assert not (tmp_path / "card.json").exists()


def test_equal_files_give_equal_bytes(artifact: Path, tmp_path: Path) -> None:
    first = pack(artifact)
    first.unpack(tmp_path / "copy")
    assert pack(tmp_path / "copy") == first


@pytest.mark.parametrize(
    "parcel",
    [archive("../out"), archive("/tmp/out"), archive("link", tarfile.SYMTYPE), archive("device", tarfile.CHRTYPE)],
    ids=["upwards", "absolute", "link", "device"],
)
def test_refuses_what_is_no_file_within(parcel: Parcel, tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="within its folder"):
        parcel.unpack(tmp_path / "there")
    assert list(tmp_path.iterdir()) == []


def test_goes_through_a_storage(artifact: Path, tmp_path: Path) -> None:
    with own_storage(str(tmp_path / "share"), tmp_path / "run") as storage:
        parcel = pack(artifact, storage)
        assert not parcel.data
        parcel.unpack(tmp_path / "there")
        assert (tmp_path / "there" / "card.json").read_text() == "{}"
        parcel.discard()
        with pytest.raises(SearchError, match=r"ray\.storage must be readable on all nodes"):
            parcel.unpack(tmp_path / "there")
        pack(artifact, storage)
        parcel.discard()  # twice does no harm
    assert list((tmp_path / "share").iterdir()) == []


def test_what_a_killed_driver_left_goes_when_its_run_goes_on(artifact: Path, tmp_path: Path) -> None:
    share, run = str(tmp_path / "share"), tmp_path / "run"
    killed = own_storage(share, run)
    pack(artifact, killed.__enter__())
    with own_storage(share, run) as storage, own_storage(share, tmp_path / "other") as other:
        assert storage != other
        assert list(Path(str(storage)).iterdir()) == []


def test_goes_through_a_url(artifact: Path, tmp_path: Path) -> None:
    with own_storage("memory://bucket/folder", tmp_path) as storage:
        pack(artifact, storage).unpack(tmp_path / "there")
    assert (tmp_path / "there" / "card.json").is_file()


@pytest.mark.parametrize("storage", ["nonsense://bucket", "/proc/share"])
def test_refuses_a_storage_that_is_none(storage: str) -> None:
    with pytest.raises(JobError, match=r"ray\.storage must be a place to write to"), own_storage(storage, Path("run")):
        pass


def test_packs_nothing(tmp_path: Path) -> None:
    pack_files({}).unpack(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
