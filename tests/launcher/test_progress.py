"""What a person sees: paced lines in a log, every step on a terminal, a bar that does not stay."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from launcher.progress import TERMINAL, StepProgress, TerminalBar, short, step_line
from launcher.step_record import StepRecord


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def record(step: int, skipped: bool = False) -> StepRecord:
    return StepRecord(step, 3.25, 1.5, 1e-3, 100 * step, 12_345.0, 0.75, skipped)


def run(progress: StepProgress, clock: Clock, steps: range, seconds: float) -> None:
    for step in steps:
        clock.now += seconds
        progress.step(record(step))


def test_a_log_gets_the_first_ten_steps_and_then_a_line_now_and_then() -> None:
    out, clock = io.StringIO(), Clock()
    run(StepProgress(40, out=out, clock=clock), clock, range(1, 41), 1.0)
    shown = [int(line.split()[1].split("/")[0]) for line in out.getvalue().splitlines()]
    assert shown == [*range(1, 11), 15, 20, 25, 30, 35, 40]
    assert "\x1b" not in out.getvalue(), "no control characters in a log"


def test_every_step_is_shown_when_a_terminal_is_behind_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(TERMINAL, "1")
    out, clock = io.StringIO(), Clock()
    run(StepProgress(40, out=out, clock=clock), clock, range(1, 41), 0.1)
    assert len(out.getvalue().splitlines()) == 40


def test_a_skipped_step_is_always_shown() -> None:
    out, clock = io.StringIO(), Clock()
    progress = StepProgress(100, out=out, clock=clock)
    run(progress, clock, range(1, 12), 0.1)
    progress.step(record(12, skipped=True))
    assert "step  12/100" in out.getvalue() and "SKIPPED" in out.getvalue()
    assert "step  11/100" not in out.getvalue()


def test_the_log_file_has_a_dated_line_for_every_step_and_note(tmp_path: Path) -> None:
    clock = Clock()
    for first in (0, 20):
        progress = StepProgress(
            40,
            first_step=first,
            log_file=tmp_path / "logs" / "train.log",
            out=io.StringIO(),
            clock=clock,
        )
        run(progress, clock, range(first + 1, first + 21), 0.01)
        progress.note("validation [0.5]")
        progress.close()
        progress.close()
    lines = (tmp_path / "logs" / "train.log").read_text().splitlines()
    assert len(lines) == 20 + 1 + 1 + 20 + 1
    assert lines[20].endswith("validation [0.5]")
    assert lines[21].endswith("going on after step 20 of 40")
    assert all(line[4] == "-" and line[10] == "T" for line in lines)


def test_the_time_left_follows_the_pace() -> None:
    out, clock = io.StringIO(), Clock()
    run(StepProgress(100, out=out, clock=clock), clock, range(1, 11), 2.0)
    assert out.getvalue().splitlines()[-1].endswith("ETA 0:03:00")


def test_other_ranks_show_and_log_nothing(tmp_path: Path) -> None:
    out, clock = io.StringIO(), Clock()
    progress = StepProgress(5, rank=1, log_file=tmp_path / "train.log", out=out, clock=clock)
    run(progress, clock, range(1, 6), 1.0)
    progress.note("x")
    assert out.getvalue() == "" and not list(tmp_path.iterdir())


def test_the_bar_follows_the_lines_that_pass_and_leaves_the_terminal_clean() -> None:
    out = io.StringIO()
    bar = TerminalBar(Console(file=out, force_terminal=True, width=120, soft_wrap=True))
    line = "preparing [x] für\n".encode()
    bar.write(line[:16])
    assert out.getvalue() == "", "half a line waits for its end"
    bar.write(line[16:])
    assert out.getvalue() == "preparing [x] für\n"
    assert "━" not in out.getvalue(), "there is no bar before the first step"
    for step in (1, 2):
        bar.write((step_line(record(step), 4, 10.0) + "\n").encode())
    assert "━" in out.getvalue() and "loss 3.2500  12.3k tok/s  ETA 0:00:10" in out.getvalue()
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l")
    bar.write(b"last words")
    bar.close()
    bar.close()
    assert out.getvalue().rstrip().endswith("last words")


def test_numbers_are_short() -> None:
    values = [0.0, 950.0, 999.6, 1234.0, 99_960.0, 4.56e6, 7.89e9, 1.5e12]
    texts = ["0", "950", "1.00k", "1.23k", "100k", "4.56M", "7.89G", "1.50T"]
    assert [short(v) for v in values] == texts
