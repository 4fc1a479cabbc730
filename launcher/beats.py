"""What a launcher sees of its ranks without asking them: a line each in memory that they share.

A rank whose process is stopped, or whose main thread holds the interpreter lock, cannot say that
it hangs. So every beat also goes into a slot of a memory file that the launcher made, and all
stacks go into another one when the launcher sends `STACKS_SIGNAL`. Both end with the processes.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import signal
import struct
import time
from dataclasses import dataclass

VARIABLE = "TINY_ONN_BEAT"
"""In a rank's environment: the two memory files' descriptors and the rank's slot, by commas."""

STACKS_SIGNAL = signal.SIGUSR2
BEAT = struct.Struct("<ddqqq64s")
SLOT_SIZE = 8 + 2 * BEAT.size
"""Bytes of a rank's slot: which of two beats is the whole one (a byte, and padding), and the two.

A beat is written field by field, by a process that may be held up or stopped between any two: it
goes where nobody reads, and counts from the moment when that one byte says so.
"""


@dataclass(frozen=True)
class Beat:
    """What a rank said last.

    Attributes:
        time: of that, on this machine's monotonic clock, seconds.
        limit: seconds of silence that it allows itself; 0 is no limit.
        step: optimizer steps done, -1 before the first beat.
        paused: it does something of unknown length.
        listens: it writes its stacks when asked to.
        doing: what had just ended.
    """

    time: float
    limit: float
    step: int
    paused: bool
    listens: bool
    doing: str

    @property
    def silent(self) -> float:
        """Seconds since then."""
        return time.monotonic() - self.time

    @property
    def hung(self) -> bool:
        """Whether the silence is longer than it should be."""
        return bool(self.limit) and not self.paused and self.silent > self.limit


class BeatBoard:
    """The launcher's side: a slot per rank of this node, and a file for each rank's stacks."""

    def __init__(self, ranks: int, limit: float) -> None:
        """Make room for `ranks`; until a rank's first beat its silence may last `limit` seconds."""
        self._fd = os.memfd_create("beats", 0)
        os.ftruncate(self._fd, ranks * SLOT_SIZE)
        self._memory = mmap.mmap(self._fd, ranks * SLOT_SIZE)
        self._stacks = [os.memfd_create(f"stacks{i}", 0) for i in range(ranks)]
        now = time.monotonic()
        for i in range(ranks):
            BEAT.pack_into(self._memory, _place(i * SLOT_SIZE, 0), now, limit, -1, 0, 0, b"start")

    def descriptors(self, local: int) -> tuple[int, int]:
        """Return what the process of a rank has to inherit."""
        return self._fd, self._stacks[local]

    def variable(self, local: int) -> str:
        """Return the value of `VARIABLE` for a rank of this node."""
        return f"{self._fd},{self._stacks[local]},{local}"

    def read(self, local: int) -> Beat:
        """Return what a rank said last."""
        slot, count = local * SLOT_SIZE, -1
        # Again if one ended meanwhile: the next one goes where this one was read.
        while count != (count := self._memory[slot]):
            place = _place(slot, count)
            at, limit, step, paused, listens, doing = BEAT.unpack_from(self._memory, place)
        text = doing.rstrip(b"\0").decode(errors="replace")
        return Beat(at, limit, step, bool(paused), bool(listens), text)

    def stacks(self, local: int) -> str:
        """Return the stacks that a rank has written so far."""
        size = os.fstat(self._stacks[local]).st_size
        return os.pread(self._stacks[local], size, 0).decode(errors="replace")

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        for fd in (self._fd, *self._stacks):
            os.close(fd)


class Beater:
    """A rank's side; does nothing in a process that no launcher started."""

    def __init__(self) -> None:
        """Attach to the launcher's memory and write stacks when it asks for them."""
        self._memory: mmap.mmap | None = None
        value = os.environ.get(VARIABLE)
        if not value:
            return
        board, self._stacks_fd, local = map(int, value.split(","))
        self._memory = mmap.mmap(board, os.fstat(board).st_size)
        self._slot = local * SLOT_SIZE
        # In C, without the interpreter lock, and in a process that has just been continued before
        # anything else runs in it.
        faulthandler.register(STACKS_SIGNAL, self._stacks_fd, all_threads=True)

    def write(self, limit: float, step: int, paused: bool, doing: str) -> None:
        """Show a beat of now."""
        if self._memory is not None:
            at = time.monotonic()
            text = doing.encode()[:64]
            count = self._memory[self._slot] + 1
            place = _place(self._slot, count)
            BEAT.pack_into(self._memory, place, at, limit, step, int(paused), 1, text)
            self._memory[self._slot] = count % 256


def _place(slot: int, count: int) -> int:
    """Return where in the memory the beat of this count goes, in the slot that begins at `slot`."""
    return slot + 8 + count % 2 * BEAT.size
