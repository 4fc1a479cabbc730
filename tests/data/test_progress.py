"""A corpus build shows how far it is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from data import progress
from data.build import build
from tests.data.conftest import SEQ_LEN, recipe

LINE = re.compile(r"^tokenising: ([\d.,]+) of ([\d.,]+) MB (\d+) %$", re.MULTILINE)


@pytest.fixture
def some(texts: Path, tmp_path: Path) -> Path:
    """A few of the texts, for a quick build; the second one has several batches."""
    folder = tmp_path / "some"
    folder.mkdir()
    for name in ("abc", "calendar", "csv", "fractions", "statistics", "types"):
        shutil.copy(texts / f"{name}.py", folder)
    return folder


def test_a_log_tells_of_a_build_now_and_then(
    some: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", 0.0)
    build(recipe(some, vocab_size=400, workers=1), tmp_path / "corpus", SEQ_LEN)
    said = capfd.readouterr().err
    shares = [int(m[3]) for m in LINE.finditer(said)]
    assert shares == sorted(shares) and shares[-1] == 100, said
    assert re.search(r"^tokenising: [\d.]+ MB in [\d.]+ s$", said, re.MULTILINE)
    assert "\x1b" not in said, "no control characters in a log"


def test_a_terminal_has_a_bar_for_a_build_that_does_not_stay(
    some: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Console", lambda stderr: terminal)
    build(recipe(some, vocab_size=400, workers=1), tmp_path / "corpus", SEQ_LEN)
    shown = out.getvalue()
    for what in ("drawing the tokenizer's sample", "tokenising"):
        assert what in shown
    last = shown.rpartition("tokenising")[2]
    done, total = re.findall(r"([\d.]+)/([\d.]+) .?B", re.sub(r"\x1b\[[\d;]*m", "", last))[0]
    assert done == total
    # Erased, and the cursor is back.
    assert shown.rstrip().endswith("\x1b[2K")
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l")
    assert re.search(r"^tokenising: [\d.]+ MB in", capfd.readouterr().err, re.MULTILINE)


def test_lines_in_a_log_keep_their_distance(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.progress("work", 100_000_000) as advance:
        for second in range(1, 26):
            now = float(second)
            advance(second * 4_000_000)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "work: 40.0 of 100.0 MB 40 %",
        "work: 80.0 of 100.0 MB 80 %",
        "work: 100.0 MB in 25.0 s",
    ]
