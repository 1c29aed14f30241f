"""The directory of an index: written completely or not at all, with a manifest that describes and verifies it."""

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ..searchable import Retriever

MANIFEST_FILE = "manifest.json"
KIND_PREFIX = "igpo_trl."

_BLOCK = 1 << 16
_BLOCKS = 32


class Index(Retriever):
    """Base of the indexes, which can be saved to a directory. A subclass implements `_write`."""

    def save(self, directory: str | Path) -> None:
        """
        Writes the index to a directory, replacing an index that is already there.

        The directory appears complete or not at all. Files that do not change are hard-linked where possible.

        Raises:
            FileExistsError: The directory contains something other than an index.
            TypeError: A part of a [`HybridIndex`] cannot be saved, such as the client of a server.
        """
        with new_index(directory, resumable=False) as (target, _):
            self._write(target)

    def _write(self, directory: Path) -> None:
        """Writes all files, the manifest last, into an empty directory."""
        raise NotImplementedError


@contextmanager
def new_index(directory: str | Path, *, resumable: bool = True, restart: bool = False) -> Iterator[tuple[Path, Path]]:
    """
    Provides an empty folder for a new index, which replaces `directory` when the block ends, and a work folder.

    After an error or a kill, `directory` is unchanged. The files in the work folder then remain for the next attempt,
    unless it is told to `restart`; a concurrent attempt is refused. Without `resumable`, nothing remains.
    """
    from filelock import FileLock, Timeout

    directory = Path(directory)
    if directory.exists() and not _is_replaceable(directory):
        raise FileExistsError(f"{directory} exists and is not an index. Choose another directory, or remove it.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    if resumable:
        partial = _partial(directory)
        partial.mkdir(exist_ok=True)
    else:
        partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    index, work = partial / "index", partial / "work"
    try:
        with FileLock(partial / "lock", timeout=0) if resumable else nullcontext():
            shutil.rmtree(index, ignore_errors=True)
            if restart:
                shutil.rmtree(work, ignore_errors=True)
            index.mkdir()
            work.mkdir(exist_ok=True)
            try:
                yield index, work
                if directory.exists():
                    os.replace(directory, partial / "previous")
                os.replace(index, directory)
                shutil.rmtree(work)
            finally:
                shutil.rmtree(index, ignore_errors=True)
                if not resumable or not work.exists() or not any(work.iterdir()):
                    shutil.rmtree(partial, ignore_errors=True)
    except Timeout as error:
        raise BlockingIOError(
            f"another process is building {directory} (lock file: {error.lock_file}). Wait until it has finished, or "
            "choose another directory."
        ) from error


def _is_replaceable(directory: Path) -> bool:
    """Whether a directory is empty or an index, complete or not. Nothing else is ever removed."""
    if not directory.is_dir() or not any(directory.iterdir()):
        return directory.is_dir()
    try:
        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        return str(manifest["kind"]).startswith(KIND_PREFIX)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _partial(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.partial"


def write_manifest(directory: Path, kind: str, version: int, **fields: Any) -> None:
    """Writes the manifest of the index whose files are in a folder. Must be the last file to be written."""
    files = {path.name: file_checksum(path) for path in sorted(directory.iterdir()) if path.is_file()}
    manifest = {"kind": kind, "version": version, **fields, "files": files}
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def file_checksum(path: Path) -> dict[str, int]:
    """
    Size and CRC-32 of a file: of the whole file up to 2 MiB, else of 32 blocks of 64 KiB spread over it.

    It detects files that were swapped, cut off, zeroed or overwritten, in a few milliseconds for any size.
    """
    size, crc = path.stat().st_size, 0
    with open(path, "rb") as file:
        if size <= _BLOCK * _BLOCKS:
            crc = zlib.crc32(file.read())
        else:
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
                crc = zlib.crc32(file.read(_BLOCK), crc)
    return {"bytes": size, "crc32": crc}


def read_manifest(directory: str | Path, kind: str | None = None, version: int | None = None) -> dict[str, Any]:
    """
    Reads the manifest of an index, and checks the index's files against it and, if given, its kind and version.

    Raises a `FileNotFoundError` if there is no index, and a `ValueError` if it is damaged or of another kind.
    """
    directory = Path(directory)
    path = directory / MANIFEST_FILE
    if not path.is_file():
        if _partial(directory).is_dir():
            problem = "its build was interrupted or is still running. Repeat its `igpo index` command to resume it."
            raise FileNotFoundError(f"no index in {directory}: {problem}")
        command = f"igpo index --corpus FILE --out {directory}"
        raise FileNotFoundError(f"no index in {directory} (no {MANIFEST_FILE} there). Make one with: {command}")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["crc32"]) for name, entry in manifest.get("files", {}).items()}
        if not isinstance(manifest["kind"], str) or not isinstance(manifest["version"], int):
            raise TypeError("kind or version")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Build the index again.") from error
    for name, (size, crc) in files.items():
        file = directory / name
        if not file.is_file():
            raise ValueError(f"{file} is missing. The index is incomplete; build it again.")
        got = file_checksum(file)
        if got["bytes"] != size:
            raise ValueError(
                f"{file} has {got['bytes']} bytes, expected {size}. The index is incomplete; build it again."
            )
        if got["crc32"] != crc:
            raise ValueError(f"{file} is damaged: its checksum differs from the manifest's. Build the index again.")
    if kind is not None and (manifest["kind"], manifest["version"]) != (kind, version):
        raise ValueError(
            f"{directory} contains an index of kind {manifest['kind']!r}, version {manifest['version']!r}; this "
            f"release reads kind {kind!r}, version {version}. Build the index again."
        )
    return manifest


def link_or_copy(source: Path, target: Path) -> None:
    """Hard-links a file where the file system can do that, else copies it. The files of an index never change."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
