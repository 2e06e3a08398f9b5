"""A checkpoint on disk: whole and as it was written, or not there.

::

    checkpoints/
      step-00000100/
        stage-00.safetensors     all tensors of a stage, nothing pickled; one file per stage, so
        stage-01.safetensors     that any number of workers can go on from it
        manifest.json            everything else, and size and SHA-256 of each file; written last
        unfinished               instead of it, from before the first file until after the last

A folder with neither has lost its manifest. The manifest holds its own SHA-256 and has one
spelling only, so that no byte of any file can change unnoticed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from pglpipe.errors import DataError
from pglpipe.utils.snapshot import Snapshot

FORMAT = 3
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"
_STEP = re.compile(r"step-(\d{8,})")
_CHUNK = 1 << 20

Manifest = dict[str, Any]


class Damaged(DataError):
    """A checkpoint is not as it was written; the message says what is wrong with it."""


class Unfinished(Damaged):
    """A checkpoint was never finished."""


class Unreadable(Damaged):
    """A checkpoint may be whole, but cannot be read."""


@dataclass(frozen=True)
class Written:
    """A file as it was written."""

    name: str
    nbytes: int
    sha256: str


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint after so many steps is."""
    return root / f"step-{step:08d}"


def stage_file(index: int) -> str:
    """What the file of a stage is called."""
    return f"stage-{index:02d}.safetensors"


# -- writing --------------------------------------------------------------------------


def write_stage(folder: Path, index: int, snapshot: Snapshot) -> Written:
    """Writes the tensors of a stage, through to the disk.

    Args:
        snapshot: with tensors on the CPU, in row-major order.

    Raises:
        OSError: it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
    path = folder / stage_file(index)
    try:
        safetensors.torch.save_file(snapshot.tensors, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return Written(path.name, path.stat().st_size, _sha256(path))


def commit(folder: Path, manifest: Mapping[str, Any], files: list[Written]) -> None:
    """Makes a checkpoint of the files in a folder: it is one when this has returned.

    Raises:
        OSError: a file is missing or too short, or the manifest cannot be written.
    """
    for file in files:
        size = (folder / file.name).stat().st_size
        if size != file.nbytes:
            raise OSError(
                f"expected {file.nbytes} bytes in {folder / file.name}, found {size}"
            )
    text = canonical_json(
        {**manifest, "format": FORMAT, "files": [asdict(f) for f in files]}
    )
    part = folder / f"{MANIFEST}.part"
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(folder / MANIFEST)
    for directory in (folder, folder.parent):
        _sync(directory)
    with suppress(OSError):  # beside a manifest it says nothing
        (folder / UNFINISHED).unlink()


def discard(folder: Path) -> None:
    """Removes a checkpoint, if it is there; what remains of it after a kill was never finished."""
    with suppress(OSError):
        (folder / UNFINISHED).touch()
        (folder / MANIFEST).unlink(missing_ok=True)
        for path in folder.iterdir():
            if path.name != UNFINISHED:
                path.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def prune(root: Path, keep: int, newest: Path) -> None:
    """Removes what is older than ``newest``, but for ``keep`` finished checkpoints, that one included.

    What is newer was damaged when the run began, and is written anew when the run comes there.
    """
    folders = _folders(root)
    older = folders[folders.index(newest) :]
    kept = [folder for folder in older if (folder / MANIFEST).exists()][:keep]
    for folder in older:
        if folder not in kept:
            discard(folder)


# -- reading --------------------------------------------------------------------------


def newest(root: Path) -> tuple[Path | None, list[Damaged]]:
    """The newest checkpoint that is whole, and what is wrong with those that are newer."""
    damaged: list[Damaged] = []
    try:
        folders = _folders(root)
    except OSError as error:
        return None, [Unreadable(f"{root}: {error.strerror}")]
    for folder in folders:
        try:
            examine(folder)
        except Damaged as error:
            damaged.append(error)
        else:
            return folder, damaged
    return None, damaged


def examine(folder: Path) -> Manifest:
    """The manifest of a checkpoint all of whose files are as they were written.

    Raises:
        Damaged: a file is not, or not there.
    """
    manifest = read_manifest(folder)
    for file in manifest["files"]:
        path = folder / file["name"]
        try:
            size = path.stat().st_size
            if size != file["nbytes"]:
                raise Damaged(f"{path}: expected {file['nbytes']} bytes, found {size}")
            if _sha256(path) != file["sha256"]:
                raise Damaged(f"{path}: its SHA-256 is not that of the manifest")
        except FileNotFoundError as error:
            raise Damaged(f"{path}: {error.strerror}") from None
        except OSError as error:
            raise Unreadable(f"{path}: {error.strerror}") from None
    return manifest


def read_stage(folder: Path, manifest: Manifest, index: int) -> Snapshot:
    """What a stage was, with tensors on the CPU.

    Raises:
        Damaged: its file is not as it was written.
    """
    path = folder / stage_file(index)
    (expected,) = (f["sha256"] for f in manifest["files"] if f["name"] == path.name)
    try:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != expected:
            raise Damaged(f"{path}: its SHA-256 is not that of the manifest")
        tensors = safetensors.torch.load(data)
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from None
    except SafetensorError as error:
        raise Damaged(f"{path}: {error}") from None
    return Snapshot(tensors, manifest["stages"][index]).laid_out()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        Damaged: it is not as it was written, or not there.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
        content = {k: v for k, v in manifest.items() if k != "sha256"}
        if canonical_json(content) != text:
            raise ValueError
    except FileNotFoundError:
        if (folder / UNFINISHED).exists():
            raise Unfinished(f"{folder}: it was never finished") from None
        raise Damaged(f"{folder}: it has no {MANIFEST}") from None
    except OSError as error:
        raise Unreadable(f"{path}: {error.strerror}") from None
    except (ValueError, AttributeError, RecursionError):
        raise Damaged(f"{path}: it is not as it was written") from None
    if manifest.get("format") != FORMAT:
        raise Damaged(
            f"{path}: expected format {FORMAT}, got {manifest.get('format')!r}; use the version of "
            "pglpipe that wrote it"
        )
    if not _is_complete(manifest):
        raise Damaged(f"{path}: it does not say what a manifest says")
    return manifest  # type: ignore[no-any-return]


def _is_complete(manifest: Manifest) -> bool:
    """Whether files and stages are there in the form that is read; a name leads nowhere else."""
    files, stages = manifest.get("files"), manifest.get("stages")
    if not isinstance(files, list) or not isinstance(stages, list) or not stages:
        return False
    names = [file.get("name") for file in files if isinstance(file, dict)]
    return (
        sorted(map(str, names)) == sorted(map(stage_file, range(len(stages))))
        and len(names) == len(files)
        and all(isinstance(stage, dict) for stage in stages)
        and all({"name", "nbytes", "sha256"} <= file.keys() for file in files)
    )


def canonical_json(content: Mapping[str, Any]) -> str:
    """The one text that says this, its own SHA-256 included."""
    said = json.dumps(content, sort_keys=True)
    digest = hashlib.sha256(said.encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, sort_keys=True, indent=1) + "\n"


def _folders(root: Path) -> list[Path]:
    """All that look like checkpoints, the newest first."""
    if not root.is_dir():
        return []
    numbered = ((_STEP.fullmatch(path.name), path) for path in root.iterdir())
    found = [(int(match[1]), path) for match, path in numbered if match]
    return [path for _, path in sorted(found, reverse=True)]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(directory: Path) -> None:
    """Has the names in a directory reach the disk, where the file system can be asked to."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
