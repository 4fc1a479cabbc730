"""Checkpoint folders as files: names, manifest, hashes, commit marker. Needs no process group.

    checkpoints/step-00000100/
        rank-00000.dense.safetensors    one file per rank and kind of state
        rank-00000.json                 that rank's plain state (loader cursor, …)
        manifest.json                   world size, size and SHA-256 of every file, the run's meta
        COMMITTED                       SHA-256 of manifest.json; written last, after every fsync

A folder counts only with its marker, and only while every file is as the manifest says. Nothing in
it is code: loading a stranger's checkpoint parses safetensors and JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.tensor_file import TensorSource, write_safetensors

FORMAT = 3
READABLE = (1, 2, 3)
"""Formats that can be read: in the first one a table's rows were a single piece; from the third on
rows that no step has touched are saved as ids alone."""
MANIFEST = "manifest.json"
MARKER = "COMMITTED"
REPLACED = ".replaced"
"""Suffix of a committed folder while its step is written anew."""

SET_ASIDE = "damaged-"
"""Prefix of a committed folder that a run could not go on from; it counts nowhere any more."""

_FOLDER = re.compile(r"step-(\d{8,})(\.replaced)?")
_ASIDE = re.compile(rf"{SET_ASIDE}step-(\d{{8,}})(\.replaced)?(\.\d+)?")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or read; names the file and the remedy."""


def folder_name(step: int) -> str:
    """Return the folder of a step, as in step-00000100."""
    return f"step-{step:08d}"


def rank_file(rank: int, kind: str) -> str:
    """Return the name of a rank's tensors of one kind (letters, digits, dots, dashes)."""
    if not re.fullmatch(r"[\w.-]+", kind):
        raise ValueError(f"checkpoint: kind {kind!r} cannot be part of a file name")
    return f"rank-{rank:05d}.{kind}.safetensors"


def rank_meta_file(rank: int) -> str:
    """Return the name of a rank's plain state."""
    return f"rank-{rank:05d}.json"


def folders(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of everything under `root` named like a checkpoint, newest first."""
    if not root.is_dir():
        return []
    found = []
    for path in root.iterdir():
        match = _FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), match[2] is None, path))
    return [(step, path) for step, _, path in sorted(found, reverse=True)]


def is_committed(path: Path) -> bool:
    """Whether the folder has its commit marker."""
    return (path / MARKER).is_file()


def sync(path: Path) -> None:
    """Make a file's contents, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file's contents, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_tensors(
    path: Path, source: TensorSource, moved: Callable[[int], None] = lambda _: None
) -> dict[str, Any]:
    """Write and sync a safetensors file; return its manifest entry.

    Args:
        path: of the file.
        source: what it holds.
        moved: told the bytes of every write.

    Raises:
        CheckpointError: the file cannot be written; says how much space is left.
    """
    try:
        return write_safetensors(path, source, moved=moved)
    except OSError as e:
        raise write_error(path, e) from e


def write_json(path: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """Write and sync a JSON file; return its manifest entry.

    Raises:
        CheckpointError: not JSON, or the file cannot be written; says how much space is left.
    """
    try:
        text = json.dumps(value, indent=1)
    except TypeError as e:
        raise CheckpointError(f"{path.name}: only plain values can be saved as JSON: {e}") from e
    return write_text(path, text)


def write_text(path: Path, text: str) -> dict[str, Any]:
    """Write and sync a text file; return its manifest entry; raises like `write_json`."""
    try:
        path.write_text(text)
        return _entry(path)
    except OSError as e:
        raise write_error(path, e) from e


def _entry(path: Path) -> dict[str, Any]:
    sync(path)
    return {"size": path.stat().st_size, "sha256": digest(path)}


def write_error(path: Path, error: OSError) -> CheckpointError:
    """Return an error that says what could not be written and what to do about it."""
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        remedy = "Make the folder writable for this user, or move the run's folder"
    else:
        remedy = (
            "Free some space, keep fewer checkpoints (checkpoint.keep_last, "
            "checkpoint.keep_every) or move the run's folder"
        )
    place = next(folder for folder in path.parents if folder.exists())
    free = shutil.disk_usage(place).free
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror or error} ({free:,} bytes free there). "
        f"{remedy}; the checkpoints before are untouched, and the same command goes on from them"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises CheckpointError naming the file when it is not one."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: cannot be read: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {type(value).__name__} instead of a JSON object")
    return value


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a committed folder's manifest and check it against the marker.

    Raises:
        CheckpointError: no marker, a damaged manifest, or a format of another version.
    """
    if not is_committed(path):
        raise CheckpointError(f"{path}: has no {MARKER} marker: its writing was never finished")
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{manifest}: missing")
    expected, found = (path / MARKER).read_text().strip(), digest(manifest)
    if found != expected:
        raise CheckpointError(f"{manifest}: SHA-256 {found[:12]}… is not {expected[:12]}…")
    values = read_json(manifest)
    if values.get("format") not in READABLE:
        raise CheckpointError(
            f"{manifest}: format {values.get('format')}; this version reads "
            f"{', '.join(map(str, READABLE))}"
        )
    return values


def check_file(path: Path, entry: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a file of the manifest, or None."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return f"{path}: missing"
    if size != entry["size"]:
        return f"{path}: {size:,} bytes instead of {entry['size']:,}"
    try:
        found = digest(path)
    except OSError as e:
        return f"{path}: cannot be read: {e}"
    if found != entry["sha256"]:
        return f"{path}: SHA-256 {found[:12]}… is not {entry['sha256'][:12]}…"
    return None


def verify(path: Path) -> list[str]:
    """Check a checkpoint folder completely; return its problems, none when it can be used."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as e:
        return [str(e)]
    checks = (check_file(path / name, entry) for name, entry in manifest["files"].items())
    return [problem for problem in checks if problem]


@dataclass(frozen=True)
class CheckpointInfo:
    """A folder that `list_checkpoints` found.

    Attributes:
        step: optimizer steps it was saved after.
        path: the folder.
        committed: has its marker; `verify` tells whether it is intact.
        size: bytes of all files together.
    """

    step: int
    path: Path
    committed: bool
    size: int


def list_checkpoints(root: Path) -> list[CheckpointInfo]:
    """Return the checkpoints under a run's `checkpoints` folder, oldest first, unfinished too."""
    return [_info(step, path) for step, path in reversed(folders(root))]


def list_set_aside(root: Path) -> list[CheckpointInfo]:
    """Return the damaged checkpoints that were set aside; the run does not count with them."""
    found = [(_ASIDE.fullmatch(path.name), path) for path in sorted(root.glob(f"{SET_ASIDE}*"))]
    return [_info(int(match[1]), path, counts=False) for match, path in found if match]


def _info(step: int, path: Path, counts: bool = True) -> CheckpointInfo:
    size = sum(f.stat().st_size for f in path.iterdir() if f.is_file())
    return CheckpointInfo(step, path, counts and is_committed(path), size)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that nobody takes it for one; returns its new place."""
    target = path.with_name(SET_ASIDE + path.name)
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{SET_ASIDE}{path.name}.{number}")
    os.rename(path, target)
    sync(path.parent)
    return target


def remove(path: Path) -> None:
    """Delete a checkpoint folder, its marker first, so that no half of it ever counts."""
    (path / MARKER).unlink(missing_ok=True)
    sync(path)
    shutil.rmtree(path)
