"""Files of one JSON object a line that survive kill -9: whole lines or nothing, none twice.

Every line has an integer `step`. Opening a file to go on from step s removes what a killed run
wrote after its last checkpoint (lines with a later step) and a torn last line, in one atomic
replacement.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the object on a line, None when it is cut short or no object with an integer step."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, a torn last line left out; nothing when there is no file.

    Raises:
        ValueError: a line that is not the last cannot be read; names file and line.
    """
    if not path.exists():
        return
    torn_at = 0
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if torn_at:
                raise ValueError(
                    f"{path}:{torn_at}: not a JSON object with an integer 'step', and not the last "
                    "line: the file was edited or damaged; remove the line"
                )
            row = parse(line)
            if row is None:
                torn_at = number
            else:
                yield row


def plain(value: Any) -> Any:
    """Make a value JSON can hold: non-finite floats become None (JSON has no NaN)."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return value


@dataclass(frozen=True)
class Cleaned:
    """What opening a file removed: lines of later steps, lines that could not be read."""

    later: int = 0
    torn: int = 0


class JsonLines:
    """An append-only file of rows, opened to go on after a step."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Open for appending; rows with step > resume_step and torn lines are removed first."""
        self.path = path
        self.cleaned = _clean(path, resume_step)
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row; it is in the kernel's hands, safe from kill -9, when this returns.

        Raises:
            OSError: the line could not be written in full (disk full); the file is as before.
        """
        data = (json.dumps(plain(row), allow_nan=False) + "\n").encode()
        size = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, data)
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError as e:
            os.ftruncate(self._fd, size)
            raise OSError(
                e.errno, f"{e.strerror} (free space there; the run resumes)", str(self.path)
            ) from e

    def sync(self) -> None:
        """Wait until every row is on the disk, so that it outlives the machine too."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file; it cannot be appended to afterwards."""
        os.close(self._fd)


def _clean(path: Path, resume_step: int) -> Cleaned:
    if not path.exists():
        return Cleaned()
    later = torn = 0
    scratch = path.with_name(path.name + ".partial")
    with path.open("rb") as old, scratch.open("wb") as new:
        for line in old:
            row = parse(line)
            if row is None:
                torn += 1
            elif row["step"] > resume_step:
                later += 1
            else:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    if later or torn:
        os.chmod(scratch, path.stat().st_mode & 0o777)
        os.replace(scratch, path)
    else:
        scratch.unlink()
    return Cleaned(later, torn)
