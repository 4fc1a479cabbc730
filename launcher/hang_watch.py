"""A launcher's eye on its ranks: it notices hangs that a rank cannot notice itself.

A rank's own watchdog is the first to speak. What it cannot know (its process is stopped, or holds
the interpreter lock for good) is seen here: the state of every process, and the stacks, which each
writes on a signal.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from launcher import hang
from launcher.beats import STACKS_SIGNAL, BeatBoard
from launcher.lifecycle import RunFolder

OWN_WORD_SECONDS = 1.5
"""How much later than a rank's own watchdog the launcher speaks up."""

STACKS_SECONDS = 5.0
"""How long a process may take to write its stacks: a busy machine lets it wait for its turn."""

OTHER_NODES_SECONDS = 5.0
"""How long the report waits for what other nodes saw."""

PATIENCE = 15.0
"""After so many seconds hung ranks are ended that do not end themselves."""


class Watched(Protocol):
    """A rank's process."""

    @property
    def rank(self) -> int: ...
    @property
    def process(self) -> subprocess.Popen[bytes]: ...


class HangWatch:
    """Looks after the ranks of this node."""

    def __init__(
        self,
        ranks: Sequence[Watched],
        board: BeatBoard,
        folder: RunFolder,
        node: int,
        nodes: int,
    ) -> None:
        """Begin to watch; call `over` again and again."""
        self.ranks, self.board, self.folder = ranks, board, folder
        self.node, self.nodes = node, nodes
        self._next = 0.0
        self._since: float | None = None

    def over(self) -> bool:
        """Look at the ranks (at most once a second); True when hung ranks have to be ended."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + 1.0
        if self._since is None and any(map(self._hung, range(len(self.ranks)))):
            self._since = now
            self._look()
        return self._since is not None and now - self._since > PATIENCE

    def conclude(self) -> str:
        """Write the report of a hang; returns what it comes down to."""
        if self._since is None:
            self._look()
        logs, attempt = self.folder.logs, self.folder.attempt
        deadline = time.monotonic() + OTHER_NODES_SECONDS
        paths = [hang.node_path(logs, attempt, node) for node in range(self.nodes)]
        while not all(map(Path.exists, paths)) and time.monotonic() < deadline:
            time.sleep(0.1)
        path, summary = hang.report(logs, attempt, self.nodes * len(self.ranks))
        return f"{summary}; stacks and collectives of every rank: {path}"

    def _hung(self, local: int) -> bool:
        beat = self.board.read(local)
        alive = self.ranks[local].process.poll() is None
        return alive and beat.hung and beat.silent > beat.limit + OWN_WORD_SECONDS

    def _look(self) -> None:
        """Leave what is seen from outside: first the states, then the stacks of the speechless."""
        words: list[hang.Word] = []
        asked: dict[int, set[Path]] = {}
        logs, attempt = self.folder.logs, self.folder.attempt
        for local, watched in enumerate(self.ranks):
            beat = self.board.read(local)
            state = _state(watched.process.pid)
            word = hang.Word(
                watched.rank, socket.gethostname(), state, beat.step, beat.doing, beat.silent
            )
            words.append(word)
            spoke = hang.rank_path(logs, attempt, watched.rank).exists()
            if beat.listens and not spoke and watched.process.poll() is None:
                asked[local] = _holding(watched.process.pid)
                watched.process.send_signal(STACKS_SIGNAL)
                if state == "T":
                    # It runs the handler before anything else.
                    watched.process.send_signal(signal.SIGCONT)
        deadline = time.monotonic() + STACKS_SECONDS
        # The main thread's stack comes last, and it is the one that tells most.
        while time.monotonic() < deadline and not all(
            self.board.stacks(local) and _holding(self.ranks[local].process.pid) <= before
            for local, before in asked.items()
        ):
            time.sleep(0.02)
        for local, word in enumerate(words):
            word.stacks = self.board.stacks(local)
            if word.state == "T" and local in asked:
                # As it was: a run that has been given up must not go on for a moment.
                self.ranks[local].process.send_signal(signal.SIGSTOP)
        hang.write_words(hang.node_path(logs, attempt, self.node), words)


def _state(pid: int) -> str:
    """Return the letter that the kernel gives a process's state, Z for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def _holding(pid: int) -> set[Path]:
    """Return the threads of a process that have `STACKS_SIGNAL` waiting, or blocked.

    The kernel blocks a signal in the thread that runs its handler, until that returns.
    """
    bit = 1 << (STACKS_SIGNAL - 1)
    holding = set()
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        # A thread may end while one looks.
        with suppress(OSError):
            lines = (thread / "status").read_text().splitlines()
            # Not every sandbox's kernel tells them.
            fields = {key: value for key, _, value in (line.partition(":") for line in lines)}
            masks = [int(fields.get(key, "0"), 16) for key in ("SigPnd", "ShdPnd", "SigBlk")]
            if any(mask & bit for mask in masks):
                holding.add(thread)
    return holding
