"""What a run leaves behind for scripts and for TensorBoard: a record per step, and the model's own.

Rank 0 writes, the other ranks do nothing:

- `metrics.jsonl`: a line per step, `validation.jsonl`: a line per validation;
- `events.jsonl`: a line per event (a skipped step, a rollback, giving up), of undone steps too;
- `tensorboard/`: the same as scalars, with histograms and pictures of the sparse parts;
- through a StepProgress the terminal and `logs/train.log`.

Going on from step s removes everything of later steps, so that a killed and resumed run has exactly
one line per step. That holds when `flush` is called after the record of step s and before the
checkpoint of step s is committed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from launcher.jsonl import JsonLines, read_rows
from launcher.load_image import LoadHistory
from launcher.model_stats import (
    SUMMED,
    ModelStats,
    collect,
    derive,
    predictive_integrity,
    recording,
    scalars,
    vectors,
)
from launcher.progress import StepProgress
from launcher.spikes import undone_skips
from launcher.step_record import StepRecord, memory_bytes
from launcher.tensorboard_layout import layout

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Metrics", "StepRecord", "collect", "memory_bytes", "recording"]

log = logging.getLogger(__name__)

RECORDINGS_PER_IMAGE = 10
"""Pictures are drawn at every tenth record of the model's statistics, and at the end."""


MOST_IDS = 100
"""Longer lists are in `events.jsonl` only; TensorBoard's text tells how long they are."""


class ValidationLike(Protocol):
    """What a validation says; further numeric fields of a dataclass are written, too."""

    @property
    def loss(self) -> float: ...
    @property
    def bits_per_byte(self) -> float: ...


class Metrics:
    """Writes the records of a run; on ranks other than 0 every method does nothing.

    Attributes:
        rank: of this process.
        progress: is also told about every step.
        skipped: recorded steps that were not applied; empty on other ranks.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rank: int = 0,
        resume_step: int = 0,
        configuration: str = "",
        progress: StepProgress | None = None,
    ) -> None:
        """Open the run's files to go on after `resume_step`; 0 starts them anew.

        Args:
            folder: the run folder; made when missing.
            rank: of this process.
            resume_step: the step of the checkpoint that the run goes on from.
            configuration: the resolved configuration, shown as text.
            progress: also told about every step; closed with this object.
        """
        self.rank = rank
        self.progress = progress
        self.skipped: list[int] = []
        if rank != 0:
            return
        # TensorBoard takes a second to load, which the other ranks and the launcher save.
        from launcher.event_files import open_writer

        (folder / "tensorboard").mkdir(parents=True, exist_ok=True)
        self._steps = JsonLines(folder / "metrics.jsonl", resume_step)
        self._validations = JsonLines(folder / "validation.jsonl", resume_step)
        self._validated = {row["step"] for row in read_rows(folder / "validation.jsonl")}
        # What happened stays, also where the run went back behind it.
        self._events = JsonLines(folder / "events.jsonl", sys.maxsize)
        self._histories: dict[str, LoadHistory] = {}
        self._recordings = 0
        self._undone = 0
        self._tags: set[str] = set()
        self._read_back(folder / "metrics.jsonl", resume_step)
        self._writer = open_writer(folder / "tensorboard", resume_step)
        if configuration:
            text = f"```yaml\n{configuration.rstrip()}\n```"
            self._writer.add_text("configuration", text, resume_step)
        self._last_step = resume_step

    def _read_back(self, path: Path, resume_step: int) -> None:
        """Rebuild what accumulates over steps, and say what the killed run left or lost."""
        cleaned = self._steps.cleaned
        if cleaned.later or cleaned.torn:
            self.note(
                f"{path.name}: removed {cleaned.later} lines after step {resume_step} and "
                f"{cleaned.torn} torn lines of the run before"
            )
        found = 0
        for row in read_rows(path):
            found += 1
            if row.get("skipped"):
                self.skipped.append(row["step"])
            self._undone += len(undone_skips(row))
            self._tags.update(row.get("stats", {}))
            for tag, load in row.get("expert_load", {}).items():
                self._histories.setdefault(tag, LoadHistory()).add(row["step"], load)
        if found != resume_step:
            log.warning(
                "%s holds %d lines for %d steps: some were lost with the machine or copied without "
                "them; the checkpoint is not affected",
                *(path, found, resume_step),
            )

    def step(self, record: StepRecord, stats: ModelStats | None = None) -> None:
        """Write one step, with the model's statistics when it was a recorded one.

        Raises:
            ValueError: the step does not follow the one written last.
            OSError: the disk is full or gone; names the file.
        """
        if self.rank != 0:
            return
        if record.step != self._last_step + 1:
            raise ValueError(
                f"step {record.step} cannot be recorded after step {self._last_step}: every step "
                "is written once, in order"
            )
        row = record.row()
        if record.skipped:
            self.skipped.append(record.step)
        self._undone += len(undone_skips(row))
        skipped = len(self.skipped) + self._undone
        shown = record.scalars() | {"train/skipped_steps": float(skipped)}
        if stats:
            derive(stats)
            model = scalars(stats)
            model |= self._integrity(record.loss, model)
            arrays = vectors(stats)
            loads = {t: a for t, a in arrays.items() if t.endswith("/expert_load") and "layer" in t}
            row["stats"] = model
            row["expert_load"] = {t: [float(f"{x:.6g}") for x in a] for t, a in loads.items()}
            shown |= model
        self._steps.append(row)
        self._last_step = record.step
        self._scalars(shown, record.step)
        if record.event is not None:
            ids = {} if record.sample_ids is None else {"sample_ids": record.sample_ids}
            self.event(record.step, {**record.event, **ids})
        if stats:
            self._recordings += 1
            for tag, array in arrays.items():
                self._histogram(tag, array, record.step)
            for tag, load in loads.items():
                self._histories.setdefault(tag, LoadHistory()).add(record.step, load)
            if self._recordings % RECORDINGS_PER_IMAGE == 1:
                self._images(record.step)
        if self.progress is not None:
            self.progress.step(record)

    def validation(self, step: int, result: ValidationLike) -> None:
        """Write a validation after `step`: a line with its numbers, scalars, a note."""
        if self.rank != 0:
            return
        row: dict[str, Any] = {"loss": result.loss, "bits_per_byte": result.bits_per_byte}
        if dataclasses.is_dataclass(result) and not isinstance(result, type):
            fields = dataclasses.asdict(result)
            row |= {k: v for k, v in fields.items() if isinstance(v, int | float)}
        self._validations.append({"step": step, **row})
        self._validated.add(step)
        names = ("loss", "bits_per_byte")
        self._scalars({f"validation/{name}": row[name] for name in names}, step)
        self.note(
            f"validation after step {step}: {result.loss:.4f} nats/token, "
            f"{result.bits_per_byte:.4f} bits per byte"
        )

    def event(self, step: int, happened: Mapping[str, Any]) -> None:
        """Write what happened at `step`: its "kind", and what is worth knowing."""
        if self.rank == 0:
            self._events.append({"step": step, "time": round(time.time(), 3), **happened})
            self.text(step, json.dumps(_shortened(happened), indent=1), "events")

    def validated(self, step: int) -> bool:
        """Return whether there is a validation of this step; False on ranks other than 0."""
        return self.rank == 0 and step in self._validated

    def text(self, step: int, text: str, tag: str = "samples") -> None:
        """Show a piece of text, as generated by the model after `step`."""
        if self.rank == 0:
            # Indented by four spaces it is code in Markdown, whatever characters it contains.
            block = "\n".join(f"    {line}" for line in text.splitlines()) or "    "
            self._writer.add_text(tag, block, step)

    def note(self, text: str) -> None:
        """Show a line to whoever watches, and keep it in the log."""
        if self.progress is not None:
            self.progress.note(text)

    def flush(self) -> None:
        """Bring everything written so far to the disk; call before a checkpoint is committed."""
        if self.rank == 0:
            self._steps.sync()
            self._validations.sync()
            self._events.sync()
            self._writer.flush()

    def close(self) -> None:
        """Draw the last pictures and close every file."""
        if self.rank == 0:
            if self._recordings:
                self._images(self._last_step)
            self._writer.close()
            self._steps.close()
            self._validations.close()
            self._events.close()
        if self.progress is not None:
            self.progress.close()

    def __enter__(self) -> Metrics:
        """Return itself; leaving the block closes."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close, also after an error."""
        self.close()

    def _integrity(self, loss: float, model: Mapping[str, float]) -> dict[str, float]:
        surprise, entropy = model.get("moe/surprise"), model.get("head/entropy")
        if surprise is None or entropy is None or not math.isfinite(loss):
            return {}
        terms = predictive_integrity(loss, entropy, surprise)
        return {f"pi/{name}": value for name, value in terms.items()}

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        if not self._tags.issuperset(values):
            # TensorBoard shows the layout written last: each has only charts with something in.
            self._tags.update(values)
            self._writer.add_custom_scalars(layout(self._tags))

    def _histogram(self, tag: str, array: NDArray[np.float64], step: int) -> None:
        if tag.endswith(SUMMED):
            _add_counts(self._writer, tag, array, step)
            return
        known = array[np.isfinite(array)]
        if known.size:
            self._writer.add_histogram(tag, known, step)

    def _images(self, step: int) -> None:
        for tag, history in self._histories.items():
            self._writer.add_image(f"{tag}_over_time", history.image(), step, dataformats="HWC")


def _shortened(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _shortened(v) for k, v in value.items()}
    if isinstance(value, list) and len(value) > MOST_IDS:
        return f"{len(value)} of them, see events.jsonl"
    return value


def _add_counts(writer: SummaryWriter, tag: str, counts: NDArray[np.float64], step: int) -> None:
    """Write a histogram whose bucket k already holds how often the value k occurred."""
    k = np.arange(len(counts))
    writer.add_histogram_raw(
        tag,
        min=0,
        max=len(counts) - 1,
        num=int(counts.sum()),
        sum=float((k * counts).sum()),
        sum_squares=float((k * k * counts).sum()),
        bucket_limits=(k + 0.5).tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
