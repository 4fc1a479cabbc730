"""The last words of a run: what was trained, how well, and where everything is.

Reads only small files, the run folder's and the corpus's `index.json`, so that it can be told again
for a finished run without loading anything.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from launcher.jsonl import read_rows
from launcher.spikes import undone_skips


def summary(folder: Path, corpus: Path | None = None, *, terminal: bool | None = None) -> str:
    """Return the summary of a run as text.

    Args:
        folder: the run folder.
        corpus: folder of the corpus, for the held-out text's size under gzip; the one of the run's
            `config.yaml` by default.
        terminal: draw a coloured table; by default when standard output is a terminal.

    Raises:
        ValueError: a damaged metrics file; names file and line.
    """
    rows = facts(folder, corpus)
    if terminal is None:
        terminal = sys.stdout.isatty()
    if not terminal:
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
    table = Table(title=f"run {folder.name}", show_header=False, title_justify="left")
    table.add_column(style="cyan", no_wrap=True)
    # The command must be copied as one line, however narrow the terminal.
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    text = io.StringIO()
    columns = max(os.get_terminal_size().columns if sys.stdout.isatty() else 0, 100)
    Console(file=text, force_terminal=True, width=columns, highlight=False).print(table)
    return text.getvalue().rstrip("\n")


def facts(folder: Path, corpus: Path | None = None) -> list[tuple[str, str]]:
    """Return what the summary says, as (name, text) in order; see `summary`."""
    config = _config(folder)
    steps = tokens = skipped = 0
    seconds = 0.0
    last: dict[str, Any] = {}
    for row in read_rows(folder / "metrics.jsonl"):
        steps += 1
        skipped += bool(row.get("skipped")) + len(undone_skips(row))
        if row.get("tokens_per_s"):
            seconds += (row["tokens"] - tokens) / row["tokens_per_s"]
        tokens, last = row["tokens"], row
    if not steps:
        return [("run", str(folder)), ("steps", "none yet")]
    planned = config.get("train", {}).get("steps")
    of = f" of {planned:,}" if planned else ""
    note = f" ({skipped:,} skipped)" if skipped else ""
    out = [
        ("run", str(folder)),
        ("steps", f"{last['step']:,}{of}{note}"),
        ("tokens", f"{tokens:,}"),
    ]
    if seconds:
        took = timedelta(seconds=round(seconds))
        out.append(("speed", f"{tokens / seconds:,.0f} tokens/s ({took} in training steps)"))
    out.append(("training loss", _quality(last)))
    validations = list(read_rows(folder / "validation.jsonl"))
    if validations:
        out.append(
            (
                "validation loss",
                f"{_quality(validations[-1])} (after step {validations[-1]['step']:,})",
            )
        )
    else:
        out.append(("validation loss", "none was measured"))
    out.append(("gzip -9", _gzip(config, corpus)))
    return [*out, ("checkpoints", _checkpoints(folder)), ("TensorBoard", tensorboard_line(folder))]


def tensorboard_line(folder: Path) -> str:
    """Return the command that shows the run, for the environment that this Python belongs to."""
    program = Path(sys.executable).with_name("tensorboard")
    if not program.exists():
        return f"tensorboard --logdir {shlex.quote(str(folder))}"
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    return f"{shlex.quote(str(program))} --logdir {shlex.quote(str(folder))}"


def _quality(row: dict[str, Any]) -> str:
    loss, bits = row.get("loss"), row.get("bits_per_byte")
    if loss is None or bits is None:
        return "not a finite number"
    return f"{loss:.4f} nats/token, {bits:.4f} bits per byte"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    tree = yaml.safe_load(path.read_text()) if path.exists() else None
    return tree if isinstance(tree, dict) else {}


def _gzip(config: dict[str, Any], corpus: Path | None) -> str:
    data = config.get("data", {})
    path = corpus if corpus is not None else Path(data.get("path", "corpus"))
    index = path / "index.json"
    if not index.exists():
        return f"not known: {index} is not on this machine"
    split = data.get("validation_split", "validation")
    bits = json.loads(index.read_text()).get("splits", {}).get(split, {}).get("gzip_bits_per_byte")
    if bits is None:
        return f"not known: {index} has no such measurement of '{split}'"
    return f"{bits:.4f} bits per byte of the same held-out text"


def _checkpoints(folder: Path) -> str:
    path = folder / "checkpoints"
    committed = sorted(p.parent.name for p in path.glob("step-*/COMMITTED"))
    if not committed:
        return f"{path} (none committed)"
    return f"{path} ({len(committed)} kept, newest {committed[-1]})"
