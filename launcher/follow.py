"""Evaluate a run's checkpoints beside its training, each once, as they appear.

Results go into the run's folder: a line each in `evaluation/evaluation.jsonl`, and the same as
scalars in `evaluation/tensorboard/`, which `tensorboard --logdir runs/NAME` shows as a curve beside
the run's own. A checkpoint is held by hard links while it is read, so that the run may remove it.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from launcher.components import Components
from launcher.evaluate import Validation, validate
from launcher.jsonl import JsonLines, read_rows
from launcher.lifecycle import RunFolder
from launcher.resume import restore_to_read
from parallel.checkpoint import CheckpointError, list_checkpoints

WAIT, END = -1, -2
TICK_SECONDS = 2.0
RESULTS = "evaluation.jsonl"


def evaluated(folder: RunFolder) -> set[int]:
    """Return the steps that `folder` (the evaluation's own) has results of."""
    return {row["step"] for row in read_rows(folder.root / RESULTS)}


class Follower:
    """Finds the next checkpoint to evaluate, holds it, and writes down what came out."""

    def __init__(self, c: Components, run: RunFolder, held: Path, sequences: int) -> None:
        """Prepare on all ranks; rank 0 writes.

        Args:
            c: built with `held` as its folder of checkpoints.
            run: the run that is trained.
            held: where a checkpoint is kept while it is read.
            sequences: held-out sequences of an evaluation; 0 takes all.
        """
        self.c, self.run, self.held, self.sequences = c, run, held, sequences
        if c.mesh.is_first:
            self._lines = JsonLines(c.folder.root / RESULTS, resume_step=2**62)
            self._writer = SummaryWriter(str(c.folder.tensorboard))
            self._done = evaluated(c.folder)

    def follow(self, until_done: bool, patience: float) -> str:
        """Evaluate what is there and, with `until_done`, what comes until the run is DONE.

        Args:
            until_done: wait for new checkpoints until the run is done or stopped.
            patience: seconds without a new checkpoint after which waiting makes no sense.

        Returns:
            Why it ended, in words; on rank 0.
        """
        since = time.monotonic()
        while True:
            step, why = self._next(until_done, patience - (time.monotonic() - since))
            if step == END:
                break
            if step == WAIT:
                time.sleep(TICK_SECONDS)
                self.c.watchdog.beat(self.c.step, "waiting for a checkpoint")
                continue
            self._evaluate(step)
            since = time.monotonic()
        if self.c.mesh.is_first:
            # Made when the components were built, also where there was nothing to evaluate.
            shutil.rmtree(self.held, ignore_errors=True)
            self._writer.close()
            self._lines.close()
        return why

    def _evaluate(self, step: int) -> None:
        try:
            restore_to_read(self.c, step)
            result = validate(self.c, self.sequences)
        except CheckpointError as e:
            # The same on all ranks, which all look at every file.
            if self.c.mesh.is_first:
                print(f"step {step} is passed over: {e}", flush=True)
                self._done.add(step)
            return
        finally:
            dist.barrier()
            if self.c.mesh.is_first:
                shutil.rmtree(self.held, ignore_errors=True)
        self.c.watchdog.beat(step, "step")
        if self.c.mesh.is_first:
            self._record(step, result)

    def _record(self, step: int, result: Validation) -> None:
        self._lines.append({"step": step, "time": round(time.time(), 3), **result.__dict__})
        self._lines.sync()
        self._done.add(step)
        for name in ("loss", "bits_per_byte"):
            self._writer.add_scalar(f"validation/{name}", getattr(result, name), step)
        self._writer.flush()
        print(
            f"evaluation of step {step}: {result.loss:.4f} nats/token, "
            f"{result.bits_per_byte:.4f} bits per byte",
            flush=True,
        )

    def _next(self, until_done: bool, patience: float) -> tuple[int, str]:
        """Return the step to evaluate, WAIT or END, the same on all ranks, and why (rank 0)."""
        step, why = self._choose(until_done, patience) if self.c.mesh.is_first else (WAIT, "")
        told = torch.tensor(step)
        dist.broadcast(told, src=0)
        return int(told), why

    def _choose(self, until_done: bool, patience: float) -> tuple[int, str]:
        if reason := self.c.stop.local():
            return END, reason.text
        # Looked for before the checkpoints: the last one is committed by then.
        ended = next((p for p in (self.run.done, self.run.stop) if p.exists()), None)
        committed = [i for i in list_checkpoints(self.run.checkpoints) if i.committed]
        for info in sorted(committed, key=lambda i: i.step):
            if info.step not in self._done and self._hold(info.path):
                return info.step, ""
        if not until_done:
            return END, "every committed checkpoint is evaluated"
        if ended is not None:
            return END, f"every committed checkpoint is evaluated, and {ended} ends the run"
        if patience < 0:
            return END, f"no new checkpoint in {self.run.checkpoints} for too long (--patience)"
        return WAIT, ""

    def _hold(self, path: Path) -> bool:
        """Link a checkpoint's files; False when the run has removed it meanwhile."""
        target = self.held / path.name
        shutil.rmtree(self.held, ignore_errors=True)
        target.mkdir(parents=True)
        try:
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                link = target / file.relative_to(path)
                link.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, link)
        except FileNotFoundError:
            return False
        return True
