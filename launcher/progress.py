"""What a person sees of a run: a line per step, and on a terminal a bar with the time left.

Rank 0 writes the lines (`StepProgress`): one per step when a person watches, else one for each of
the first ten steps and then every few seconds. Its output goes to a log that the launcher copies to
its own; there, on a terminal, `TerminalBar` keeps a bar below the lines. `logs/train.log` gets one
dated line per step in any case.
"""

from __future__ import annotations

import codecs
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from launcher.step_record import StepRecord

EVERY_STEP_UP_TO = 10
SECONDS_BETWEEN_LINES = 5.0
STEPS_AVERAGED = 20

TERMINAL = "TINY_ONN_TERMINAL"
"""Environment variable of a rank: 1 when what it prints is copied to a terminal."""

STEP_LINE = re.compile(
    r"step +(?P<step>\d+)/(?P<total>\d+)  loss +(?P<loss>\S+) "
    r".* (?P<speed>\S+) tok/s.*ETA (?P<eta>.+)"
)


def short(value: float) -> str:
    """Write a number in at most six characters: 950, 12.3k, 4.56M, 7.89G, 1.23T."""
    units = ["", "k", "M", "G", "T"]
    # 999.6 would be rounded to four digits, so it is the next unit's already.
    while abs(value) >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    digits = 0 if units[0] == "" else (2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0)
    return f"{value:.{digits}f}{units[0]}"


def step_line(record: StepRecord, total_steps: int, seconds_left: float) -> str:
    """Return the line of one step, of the same width for nearly every step of a run."""
    width = len(str(total_steps))
    parts = [
        f"step {record.step:>{width}}/{total_steps}",
        f"loss {record.loss:7.4f}",
        f"bpb {record.bits_per_byte:6.4f}",
        f"lr {record.lr:.2e}",
        f"|g| {record.grad_norm:7.3f}",
        f"{short(record.tokens_per_s):>5} tok/s",
        f"{record.memory_bytes / 2**30:5.1f} GiB",
    ]
    if record.mfu is not None:
        parts.append(f"mfu {record.mfu:5.1%}")
    if record.skipped:
        parts.append("SKIPPED")
    parts.append(f"ETA {timedelta(seconds=round(seconds_left))}")
    return "  ".join(parts)


class StepProgress:
    """Writes the line of every step that ends; ranks other than 0 write nothing."""

    def __init__(
        self,
        total_steps: int,
        *,
        rank: int = 0,
        first_step: int = 0,
        log_file: Path | None = None,
        out: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start showing.

        Args:
            total_steps: steps of the whole run.
            rank: of this process; only 0 shows and logs.
            first_step: steps done before this process started (resume).
            log_file: gets one dated line per step, appended; its folder is made.
            out: where to show; standard output by default.
            clock: seconds, for the time left and the pace of the lines.
        """
        self.total_steps = total_steps
        self.rank = rank
        self._out = out or sys.stdout
        self._clock = clock
        self._watched = os.environ.get(TERMINAL) == "1" or self._out.isatty()
        self._ends: deque[float] = deque([clock()], maxlen=STEPS_AVERAGED + 1)
        self._shown = 0
        self._last_shown = clock()
        self._log: IO[str] | None = None
        if rank != 0:
            return
        if log_file is not None:
            log_file.parent.mkdir(parents=True, exist_ok=True)
            self._log = log_file.open("a", buffering=1)
        if first_step:
            self.note(f"going on after step {first_step} of {total_steps}")

    def step(self, record: StepRecord) -> None:
        """Show a step that has just ended."""
        if self.rank != 0:
            return
        now = self._clock()
        self._ends.append(now)
        line = step_line(record, self.total_steps, self.seconds_left(record.step))
        self._write_log(line)
        due = now - self._last_shown >= SECONDS_BETWEEN_LINES
        last = record.step == self.total_steps
        if self._watched or self._shown < EVERY_STEP_UP_TO or due or last or record.skipped:
            print(line, file=self._out, flush=True)
            self._last_shown = now
            self._shown += 1

    def note(self, text: str) -> None:
        """Show a line that is not a step's: a resume, a checkpoint, a validation."""
        if self.rank == 0:
            self._write_log(text)
            print(text, file=self._out, flush=True)

    def seconds_left(self, step: int) -> float:
        """Estimate the seconds to the last step from the pace of the latest ones."""
        steps = len(self._ends) - 1
        pace = (self._ends[-1] - self._ends[0]) / steps if steps else 0.0
        return pace * (self.total_steps - step)

    def close(self) -> None:
        """Close the log; harmless when called twice."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            self._log.write(f"{now}  {text}\n")


class TerminalBar:
    """Copies output to a terminal and keeps a bar below it, fed by the step lines that pass."""

    def __init__(self, console: Console | None = None) -> None:
        """Start without a bar; it appears with the first step line."""
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rest = ""
        # No refreshing thread: whoever copies the output may fork, and a fork must not inherit
        # its lock.
        self._bar = Progress(
            TextColumn("{task.fields[left]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[right]}"),
            console=self._console,
            auto_refresh=False,
            transient=True,
            expand=True,
        )
        self._task = self._bar.add_task("", total=None, left="", right="")

    def write(self, data: bytes) -> None:
        """Copy complete lines; the beginning of a line is kept until its end has come."""
        *lines, self._rest = (self._rest + self._decoder.decode(data)).split("\n")
        for line in lines:
            self._console.print(line, markup=False, highlight=False)
            match = STEP_LINE.match(line)
            if match:
                self._update(match)
        if lines and self._bar.live.is_started:
            self._bar.refresh()

    def _update(self, match: re.Match[str]) -> None:
        step, total = int(match["step"]), int(match["total"])
        self._bar.update(
            self._task,
            completed=step,
            total=total,
            left=f"{step}/{total}",
            right=f"loss {match['loss']}  {match['speed']} tok/s  ETA {match['eta']}",
        )
        if not self._bar.live.is_started:
            self._bar.start()
            # The bar hides the cursor until it is stopped, which kill -9 would prevent for good.
            self._console.show_cursor(True)

    def close(self) -> None:
        """Take the bar away and print what is left; harmless when called twice."""
        if self._bar.live.is_started:
            self._bar.stop()
        if self._rest:
            self._console.print(self._rest, markup=False, highlight=False)
            self._rest = ""
