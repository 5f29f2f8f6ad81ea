"""Folders on their way from one machine to another."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import tarfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from paretune.errors import JobError, SearchError
from paretune.objectives.artifact import replace_folder

Files = Mapping[str, Path]
"""Names in a parcel, with slashes between folders, to the files themselves."""


@dataclass(frozen=True)
class Parcel:
    """Files, packed: equal files give equal bytes.

    Attributes:
        data: A tar archive of regular files alone; empty where it lies in a shared storage.
        url: Where it lies there.
    """

    data: bytes = b""
    url: str = ""

    def unpack(self, folder: Path) -> None:
        """Put the files into a folder of their own, which appears whole in place of what is there.

        Raises:
            SearchError: It can't be read, or holds something else than files within the folder.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as made:
            whole = Path(made) / folder.name
            whole.mkdir()
            self.merge(whole)
            replace_folder(whole, folder)

    def merge(self, folder: Path, *, below: str = "") -> None:
        """Put the files into a folder beside what is there, each whole; errors as of `unpack`.

        Args:
            folder: Where they go.
            below: Only those whose names begin so, which their new names don't.
        """
        with tarfile.open(fileobj=io.BytesIO(self._read())) as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                content = archive.extractfile(member) if member.isreg() else None
                if content is None or name.is_absolute() or ".." in name.parts:
                    raise SearchError(f"a parcel must hold files within its folder alone, but got {member.name!r}")
                if not member.name.startswith(below):
                    continue
                path = folder / member.name[len(below) :]
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(f".{path.name}.part")
                part.write_bytes(content.read())
                part.replace(path)

    def discard(self) -> None:
        """Remove it from the shared storage; it can't be unpacked any more. Nothing where it isn't there."""
        if self.url:
            system, path = _open(self.url)
            if system.exists(path):
                system.rm_file(path)

    def _read(self) -> bytes:
        if not self.url:
            return self.data
        system, path = _open(self.url)
        try:
            found: bytes = system.cat_file(path)
        except OSError as error:
            raise SearchError(
                f"ray.storage must be readable on all nodes, but {self.url} isn't on {socket.gethostname()} "
                f"({type(error).__name__}: {error}); name a folder or URL that all of them reach"
            ) from error
        return found


def pack(folder: Path, storage: str | None = None) -> Parcel:
    """A folder with all below it, as a parcel; see `pack_files`."""
    return pack_files(files_below(folder), storage)


def files_below(folder: Path) -> dict[str, Path]:
    """All files of a folder and the folders in it, named relative to it."""
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def pack_files(files: Files, storage: str | None = None) -> Parcel:
    """Files as a parcel.

    Args:
        files: What goes in; of a link what it points to.
        storage: Folder or URL for fsspec, without a slash at its end, which all machines reach; None packs them into
            memory.

    Raises:
        SearchError: The storage can't be written to.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, path in sorted(files.items()):
            content = path.read_bytes()
            member = tarfile.TarInfo(name)  # without owner and time
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    if storage is None:
        return Parcel(buffer.getvalue())
    url = f"{storage}/{uuid.uuid4().hex}.tar"
    try:
        system, place = _open(storage)
        system.makedirs(place, exist_ok=True)
        system, place = _open(url)
        system.pipe_file(place, buffer.getvalue())
    except OSError as error:
        raise SearchError(
            f"ray.storage must be writable on all nodes, but {url} isn't on {socket.gethostname()} "
            f"({type(error).__name__}: {error}); name a folder or URL that all of them may write to"
        ) from error
    return Parcel(url=url)


@contextmanager
def own_storage(storage: str | None, run: Path) -> Iterator[str | None]:
    """A run's own place in a shared storage, removed afterwards with all that was left there; None has none.

    What a killed driver left there goes when its run goes on.

    Args:
        storage: Folder or URL.
        run: The run folder.

    Raises:
        JobError: It can't be written to and read from.
    """
    if storage is None:
        yield None
        return
    if "://" not in storage:
        storage = os.path.abspath(storage)  # noqa: PTH100 - a Path would do it too, but URLs are strings
    home = hashlib.sha256(f"{socket.gethostname()}:{run.resolve()}".encode()).hexdigest()[:16]
    place = f"{storage.rstrip('/')}/paretune-{run.name}-{home}"
    remedy = "name a folder or URL that all nodes reach, and install what fsspec wants for it (e.g. s3fs)"
    try:
        _remove(place)
        trial = pack_files({}, place)
        trial.merge(Path())
        trial.discard()
    except Exception as error:  # each of the storages that fsspec knows has its own
        got = f"{storage!r} ({type(error).__name__}: {error})"
        raise JobError("ray.storage", "must be a place to write to and read from", got, remedy) from error
    try:
        yield place
    finally:
        _remove(place)


def _remove(place: str) -> None:
    system, path = _open(place)
    if system.exists(path):
        system.rm(path, recursive=True)


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path there."""
    import fsspec  # type: ignore[import-untyped]  # comes with Ray; takes a while, so only where there is a storage

    return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
