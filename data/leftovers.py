"""One run at a time owns a data set's shared memory on a host; what killed runs left is removed.

mosaicml-streaming keeps segments `/dev/shm/00000N_*` and lock files `00000N_*_filelock` in the
folder for temporary files, under the first free number N. A run that is killed leaves both; even
one that ends well leaves the lock files. The next run then takes another number, except where the
same local folder is used for a remote data set: there it refuses to start.

A *claim* is a small file in /dev/shm that the leading rank of a host keeps locked while it lives.
The kernel drops the lock with the process, however it ends, so an unlocked claim belongs to a dead
run, and what it names may go:

- segments under a recorded number, if `locals` is still the very file that was recorded (inode and
  time of change), and the lock files recorded with it (by inode), once no such segment is left;
- segments of any number that name a folder which only the holder of this claim may use.

Everything must belong to this user. Nothing without a claim, of another program or another data
set, is ever touched.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SHM = Path("/dev/shm")
LOCK_FILES = ("barrier_filelock", "cache_filelock")
_START_SECONDS = 30.0


class Claim:
    """The right of this process's run to use one data set on this host; kept until it ends.

    Attributes:
        number: 0, or higher when other live runs on this host use the same data set.
        folder: what this run gives streaming as its local folder.
    """

    def __init__(self, file: Path, fd: int, number: int, folder: Path) -> None:
        """See `claim`."""
        self.number = number
        self.folder = folder
        self._file = file
        self._fd = fd
        atexit.register(self._give_up)

    def record(self, prefix: int) -> None:
        """Note under which number streaming keeps this data set.

        Makes its lock files, which streaming itself makes later: from here on no other run takes
        this number.
        """
        found = (SHM / f"{prefix:06}_locals").stat()
        entry = {
            "prefix": prefix,
            "folder": str(self.folder),
            "locals": [found.st_ino, found.st_ctime_ns],
            "lock_files": {str(p): p.stat().st_ino for p in _make_lock_files(prefix)},
        }
        data = json.dumps(entry).encode()
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))

    def _give_up(self) -> None:
        with suppress(FileNotFoundError):
            self._file.unlink()
        os.close(self._fd)


def tidy_at_exit() -> list[int]:
    """Arrange that this process, at its regular end, removes lock files that nobody needs.

    To be called on every rank, before streaming registers its own removal of segments (handlers
    run in reverse order): the rank that ends last finds no segment left, and takes the lock files.

    Returns:
        A list for the numbers under which streaming keeps this process's data sets.
    """
    prefixes: list[int] = []

    def tidy() -> None:
        with start_lock(5.0):
            for prefix in prefixes:
                if not any(SHM.glob(f"{prefix:06}_*")):
                    for path in _lock_files(prefix):
                        with suppress(FileNotFoundError):
                            if path.stat().st_uid == os.geteuid():
                                path.unlink()

    atexit.register(tidy)
    return prefixes


def claim(folder: Path, separate: bool) -> Claim:
    """Claim a data set for this run and remove what dead runs left of it.

    Args:
        folder: local folder of the data set.
        separate: whether every run needs a folder of its own below `folder` (shards are fetched
            into it) or all may read the same.

    Raises:
        OSError: /dev/shm cannot be written.
    """
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    number = 0
    while True:
        file = SHM / f"tiny-onn.{os.geteuid()}.{name}.{number}"
        fd = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _locked(fd):
            os.close(fd)
            number += 1
            continue
        if not file.exists() or file.stat().st_ino != os.fstat(fd).st_ino:
            # The run that had it ended and removed it between our opening and locking it.
            os.close(fd)
            continue
        own = folder / f"run{number}" if separate else folder
        _remove_recorded(_read(fd))
        if separate:
            for prefix in _prefixes():
                if _names(prefix, own):
                    _remove_segments(prefix)
        os.ftruncate(fd, 0)
        return Claim(file, fd, number, own)


def left_behind() -> list[Path]:
    """Return what dead runs of this user left in shared memory, whichever data set they used.

    The next start of the same data set removes it; `sweep` removes all of it.
    """
    found: list[Path] = []
    for _, entry in _dead_claims():
        if _is_recorded(entry):
            found += sorted(SHM.glob(f"{entry['prefix']:06}_*"))
    return found


def sweep(below: Path | None = None) -> None:
    """Remove what `left_behind` finds, with the lock files and the claims.

    Args:
        below: only what belongs to data sets in this folder; None removes all.
    """
    for file, entry in _dead_claims():
        if below is None or below in Path(entry.get("folder", "/")).parents:
            _remove_recorded(entry)
            file.unlink()


def _dead_claims() -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield the claims of dead runs and what they recorded, each locked while it is looked at."""
    # A run that starts would take a claim that is looked at for a living one's.
    with start_lock():
        for file in sorted(SHM.glob(f"tiny-onn.{os.geteuid()}.*.*")):
            with suppress(FileNotFoundError), file.open("r+b") as f:
                if _locked(f.fileno()):
                    yield file, _read(f.fileno())


def _locked(fd: int) -> bool:
    """Lock a file unless another process has it locked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def start_lock(seconds: float = _START_SECONDS) -> Iterator[None]:
    """Keep other runs of this user from taking or freeing numbers on this host, for the block.

    Two runs that look for a free number at the same moment would both take it. Waits at most
    `seconds` and then goes on without: across several hosts two runs could wait for each other.
    """
    fd = os.open(SHM / f"tiny-onn.{os.geteuid()}.start", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if _locked(fd):
                break
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _read(fd: int) -> dict[str, Any]:
    content = os.pread(fd, 1 << 16, 0)
    try:
        entry = json.loads(content)
    except ValueError:
        # Empty (nothing was recorded), or cut short by a kill in the middle of the write.
        return {}
    return entry if isinstance(entry, dict) else {}


def _is_recorded(entry: dict[str, Any]) -> bool:
    if not entry:
        return False
    try:
        found = (SHM / f"{entry['prefix']:06}_locals").stat()
    except FileNotFoundError:
        return False
    return bool([found.st_ino, found.st_ctime_ns] == entry["locals"])


def _remove_recorded(entry: dict[str, Any]) -> None:
    if not entry:
        return
    if _is_recorded(entry):
        _remove_segments(entry["prefix"])
    if any(SHM.glob(f"{entry['prefix']:06}_*")):
        return
    for path, inode in entry["lock_files"].items():
        with suppress(FileNotFoundError, PermissionError):
            if os.stat(path).st_ino == inode:
                os.unlink(path)


def _remove_segments(prefix: int) -> None:
    for path in SHM.glob(f"{prefix:06}_*"):
        with suppress(FileNotFoundError):
            if path.stat().st_uid == os.geteuid():
                path.unlink()


def _lock_files(prefix: int) -> list[Path]:
    return [Path(tempfile.gettempdir(), f"{prefix:06}_{name}") for name in LOCK_FILES]


def _make_lock_files(prefix: int) -> list[Path]:
    made = []
    for path in _lock_files(prefix):
        # One that exists by now is someone else's.
        with suppress(FileExistsError):
            path.touch(0o644, exist_ok=False)
            made.append(path)
    return made


def _prefixes() -> list[int]:
    names = [p.name.split("_")[0] for p in SHM.glob("[0-9]*_locals")]
    return [int(n) for n in names if n.isdecimal() and len(n) == 6]


def _names(prefix: int, folder: Path) -> bool:
    """Tell whether the segments of a number were made for a folder or for one below it."""
    path = SHM / f"{prefix:06}_locals"
    try:
        if path.stat().st_uid != os.geteuid():
            return False
        content = path.read_bytes()
    except (FileNotFoundError, PermissionError):
        return False
    size = int.from_bytes(content[:4], "little")
    # NUL-separated folders, the last field is the number itself.
    used = [Path(os.fsdecode(f)) for f in content[4:size].split(b"\0")[:-1]]
    return any(u == folder or folder in u.parents for u in used)
