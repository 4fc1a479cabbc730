"""TensorBoard's event files of a run that is resumed: no event twice, none of a step undone.

`SummaryWriter(purge_step=…)` asks readers to hide what a killed run wrote after its checkpoint, but
of TensorBoard's two loaders one hides only tags that are written again and the other hides nothing.
So the events are also taken out of the files; the purge mark is for a TensorBoard that runs already
and has read them.
"""

from __future__ import annotations

import logging
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[import-untyped]
from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

FLUSH_SECONDS = 10
"""How far TensorBoard may lag behind the run."""

LONGEST_CLOCK_WAIT = 5.0
"""Seconds to wait for this machine's clock to pass the newest event file's name."""


def open_writer(folder: Path, resume_step: int) -> SummaryWriter:
    """Open a new event file; events after `resume_step` are removed from the older ones."""
    files = event_files(folder)
    trim(files, resume_step)
    # Readers take the files in the order of their names, which begin with the second of creation.
    ahead = max((_stamp(p) for p in files), default=0) + 1 - time.time()
    if 0 < ahead <= LONGEST_CLOCK_WAIT:
        time.sleep(ahead)
    elif ahead > 0:
        log.warning(
            "%s has an event file from %.0f s in the future: set this machine's clock, or "
            "TensorBoard shows the steps in a wrong order",
            *(folder, ahead),
        )
    return SummaryWriter(
        str(folder),
        purge_step=resume_step + 1 if files else None,
        max_queue=1000,
        flush_secs=FLUSH_SECONDS,
    )


def event_files(folder: Path) -> list[Path]:
    """Return the event files of a folder, oldest first."""
    return sorted(folder.glob("events.out.tfevents.*"), key=_stamp)


def trim(files: list[Path], last_step: int) -> int:
    """Remove events after `last_step` and a torn end from the files; returns how many events went.

    Args:
        files: event files, oldest first.
        last_step: the last step that stays.
    """
    removed = 0
    for path in reversed(files):
        kept_bytes, later, earlier = 0, 0, False
        for raw, step in _records(path):
            if step > last_step:
                later += 1
            else:
                kept_bytes += len(raw)
                earlier = earlier or step > 0
        removed += later
        if kept_bytes < path.stat().st_size:
            _keep(path, last_step)
        elif earlier:
            # Whatever is older is from earlier steps still.
            break
    return removed


def _stamp(path: Path) -> int:
    return int(path.name.split(".")[3])


def _records(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield (record as it is in the file, step of its event) up to the end or a torn record.

    A record is its length (8 bytes, little endian), a checksum (4), the event, a checksum (4).
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        while len(head := f.read(12)) == 12:
            (length,) = struct.unpack("<Q", head[:8])
            if f.tell() + length + 4 > size:
                return
            data, tail = f.read(length), f.read(4)
            yield head + data + tail, Event.FromString(data).step


def _keep(path: Path, last_step: int) -> None:
    # A name that no reader takes for an event file, should this be killed.
    scratch = path.with_name(".trimmed")
    with scratch.open("wb") as f:
        f.writelines(raw for raw, step in _records(path) if step <= last_step)
        f.flush()
        os.fsync(f.fileno())
    os.chmod(scratch, path.stat().st_mode & 0o777)
    os.replace(scratch, path)
