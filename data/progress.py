"""Progress of long work on files: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LOG_EVERY_SECONDS = 10.0


class Advance(Protocol):
    """Tells how many bytes are done."""

    def __call__(self, done: int) -> None:
        """Show that `done` bytes of the total are done."""


def say(line: str) -> None:
    """Write one line to standard error, at once."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Advance]:
    """Show the progress of `total` bytes of work; the block reports with what it is given."""
    console = Console(stderr=True)
    started = time.monotonic()
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        last = started

        def log(done: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= LOG_EVERY_SECONDS:
                last = now
                share = f"{100 * done / total:.0f} %" if total else ""
                say(f"{what}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB {share}")

        yield log
    say(f"{what}: {total / 1e6:,.1f} MB in {time.monotonic() - started:.1f} s")
