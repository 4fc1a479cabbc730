"""A watchdog in every rank: a job that hangs ends, and says where it hung.

A collective with a peer that is gone, a file system that went away or a deadlock holds the main
thread in C code, where no signal handler and no exception reaches it. The watchdog is a thread:
when no beat came within the limit it leaves its part of the report (`launcher.hang`) and ends the
process. Every beat is also shown to the launcher (`launcher.beats`), which looks after ranks that
cannot even do that.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from launcher.beats import Beater
from launcher.hang import Word, last_collectives, rank_path, write_words
from launcher.lifecycle import LaunchConfig, RunFolder

EXIT_HUNG = 86
"""Exit code of a rank that its watchdog ended."""

PEERS_GRACE = 5.0
"""Seconds between writing the stacks and ending: a hang is everyone's, and the first rank that ends
takes its peers with it before they have written theirs."""


class Watchdog:
    """Ends this process when it stops making progress.

    `first_step_timeout` holds from `start` to the first step's beat, `step_timeout` after it. Call
    `beat` after every step, validation batch and save; rank 0's also write the run's heartbeat.
    """

    def __init__(self, folder: RunFolder, cfg: LaunchConfig, rank: int) -> None:
        """Prepare; `start` begins to watch."""
        self.folder, self.cfg, self.rank = folder, cfg, rank
        self.report = rank_path(folder.logs, folder.attempt, rank)
        self._beater = Beater()
        self._limit = cfg.first_step_timeout
        self._last, self._doing, self._step = time.monotonic(), "start", -1
        self._paused = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> Watchdog:
        """Watch from now on."""
        self._last = time.monotonic()
        self._show()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def beat(self, step: int, doing: str = "step") -> None:
        """Note progress: `doing` has just ended, after `step` steps of the run."""
        self._last, self._doing, self._step = time.monotonic(), doing, step
        # Other beats before the first step (model built, checkpoint loaded) do not end the start.
        if doing == "step":
            self._limit = self.cfg.step_timeout
        self._show()
        if self.rank == 0:
            self.folder.beat(step, doing)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of this block: for work of unknown length that cannot beat."""
        self._paused += 1
        self._show()
        try:
            yield
        finally:
            # In this order: the watchdog may look between the two.
            self._last = time.monotonic()
            self._paused -= 1
            self._show()

    def close(self) -> None:
        """Stop watching; the launcher still does."""
        # What is left (goodbyes to peers) must not take for ever either.
        self._beater.write(self.cfg.step_timeout, self._step, paused=False, doing="end")
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _show(self) -> None:
        self._beater.write(self._limit, self._step, self._paused > 0, self._doing)

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, (self._limit or 10.0) / 4)):
            # In this order: the main thread may pause, go on or beat between any two.
            limit, now = self._limit, time.monotonic()
            paused = self._paused > 0
            silent = now - self._last
            if limit and not paused and silent > limit:
                self._end(silent, limit)
            if limit:
                # This thread needs the interpreter lock. A main thread that hangs while holding it
                # is left to faulthandler's own C thread, which needs none (and exits with 1).
                faulthandler.dump_traceback_later(2 * limit + 60.0, exit=True)
            else:
                # One that a limit before this one has set would still end the process.
                faulthandler.cancel_dump_traceback_later()
        faulthandler.cancel_dump_traceback_later()

    def _end(self, silent: float, limit: float) -> None:
        key = "first_step_timeout" if limit == self.cfg.first_step_timeout else "step_timeout"
        what = (
            f"rank {self.rank} hung: nothing ended for {silent:.0f} s since "
            f"'{self._doing}' of step {self._step} (launch.{key} is {limit:.0f} s)"
        )
        word = Word(self.rank, socket.gethostname(), "", self._step, self._doing, silent)
        with tempfile.TemporaryFile("w+") as f:
            faulthandler.dump_traceback(f, all_threads=True)
            f.seek(0)
            word.stacks = f.read()
        try:
            word.collectives = last_collectives()
        except Exception as e:
            # Whatever the recorder's trouble, this process must end.
            print(f"rank {self.rank}: no collectives in the report: {e!r}", file=sys.stderr)
        try:
            write_words(self.report, [word])
            where = f"stacks of all threads in {self.report}"
        except OSError as e:
            where = f"cannot write {self.report} ({e.strerror}); stacks follow\n{word.stacks}"
        print(f"{what}; {where}", file=sys.stderr, flush=True)
        time.sleep(PEERS_GRACE)
        os._exit(EXIT_HUNG)
