"""An index on disk: there completely or not at all, with a manifest that says what it is and what it consists of."""

import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
KIND_PREFIX = "igpo_trl."

_BLOCK = 1 << 16
_BLOCKS = 32


@contextmanager
def new_index(directory: str | Path, *, resumable: bool = True, restart: bool = False) -> Iterator[tuple[Path, Path]]:
    """
    Gives a folder to build an index in, which becomes `directory` when the block ends, and another to work in.

    An index that is already there is replaced. After an error, and after a kill, `directory` is as it was. What lies
    in the work folder is then kept for the next attempt; the folder of the index is not.

    Args:
        directory (`str` or `Path`):
            Where the index shall be.
        resumable (`bool`, *optional*, defaults to `True`):
            Whether the next attempt finds the work folder of this one, and two at a time are refused. If not, nothing
            is kept after an error.
        restart (`bool`, *optional*, defaults to `False`):
            Whether to throw away what an earlier attempt has left in the work folder.

    Yields:
        The empty folder of the index, and the work folder.

    Raises:
        FileExistsError: The directory holds something that is no index.
        BlockingIOError: Another process builds this index at this moment.
    """
    from filelock import FileLock, Timeout

    directory = Path(directory)
    if directory.exists() and not _is_replaceable(directory):
        raise FileExistsError(f"{directory} exists and is no index. Choose another directory, or remove it.")
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
            f"another process is building {directory} (it holds {error.lock_file}). Wait for it, or choose another "
            "directory."
        ) from error


def _is_replaceable(directory: Path) -> bool:
    """Whether a directory is empty or an index, whole or not: nothing else is ever removed."""
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
    """Writes the manifest of the index whose files lie in a folder; the last thing to do for an index."""
    files = {path.name: describe(path) for path in sorted(directory.iterdir()) if path.is_file()}
    manifest = {"kind": kind, "version": version, **fields, "files": files}
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def describe(path: Path) -> dict[str, int]:
    """
    Size and checksum of a file: CRC-32 of all of it up to 2 MiB, of 32 blocks of 64 KiB spread over it beyond.

    It finds files that were mixed up, cut off, zeroed or overwritten, in a few milliseconds whatever their size.
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


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """
    Reads the manifest of an index and checks its files against it.

    Raises:
        FileNotFoundError: There is no index in the directory.
        ValueError: The manifest is damaged, or a file is missing, cut off or changed.
    """
    directory = Path(directory)
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(_no_index(directory))
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["crc32"]) for name, entry in manifest.get("files", {}).items()}
        if not isinstance(manifest["kind"], str) or not isinstance(manifest["version"], int):
            raise TypeError("kind or version")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}). Build the index again.") from error
    for name, (size, crc) in files.items():
        file = directory / name
        got = file.stat().st_size if file.is_file() else None
        if got != size:
            state = "is missing" if got is None else f"has {got} bytes, expected {size}"
            raise ValueError(f"{file} {state}. The index is incomplete; build it again.")
        if describe(file)["crc32"] != crc:
            raise ValueError(f"{file} is damaged: its checksum is not that of the manifest. Build the index again.")
    return manifest


def copy_index(source: Path, directory: str | Path) -> None:
    """Copies an index, by hard links where the file system has them: the files of an index never change."""
    with new_index(directory, resumable=False) as (target, _):
        for file in [*read_manifest(source)["files"], MANIFEST_FILE]:
            try:
                os.link(source / file, target / file)
            except OSError:
                shutil.copy2(source / file, target / file)


def check_kind(directory: str | Path, manifest: dict[str, Any], kind: str, version: int) -> None:
    """
    Checks that a manifest is one that a class can read.

    Raises:
        ValueError: It is not.
    """
    if manifest["kind"] != kind or manifest["version"] != version:
        raise ValueError(
            f"{directory} holds an index of kind {manifest['kind']!r}, version {manifest['version']!r}; this release "
            f"reads kind {kind!r}, version {version}. Build the index again."
        )


def _no_index(directory: Path) -> str:
    if _partial(directory).is_dir():
        return (
            f"no index in {directory}: its build was interrupted, or is still going on. The same `igpo index` command "
            "goes on with it."
        )
    command = f"igpo index --corpus FILE --out {directory}"
    return f"no index in {directory} (no {MANIFEST_FILE} there). Make one with: {command}"
