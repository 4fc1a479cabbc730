"""Going back to the last good checkpoint, and on with other data.

A run of spikes starts before its first one: the weights were on the way to it. So the run goes back
to the newest checkpoint before the first spike and leaves out all data from there to the last. What
is left out is kept in the run folder:

    skipped_data.json    windows of data steps that this run never trains on

A data step is what one optimizer step would take. Windows count in data steps, not in steps of the
run: whatever checkpoint the run goes on from, it skips the same data.

Killed at any moment of this, the run goes on as if it had not been: later checkpoints are discarded
first, and without its window the checkpoint leads to the same spikes again.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from launcher.lifecycle import RunFolder, write_atomically
from launcher.spikes import SpikeError

if TYPE_CHECKING:
    from launcher.components import Components


@dataclass(frozen=True)
class Window:
    """Data that a run leaves out.

    Attributes:
        begin: first data step of it.
        end: the one behind the last.
        step: checkpoint that the run went back to.
        from_step: step after which it did.
        reason: what its last spike was.
        spikes: steps that were not applied.
        samples: samples left out, counted along the run's order: [first, behind the last).
        sample_ids: their numbers in the split.
        skipped: steps that were not applied since that checkpoint. Their records are undone with
            all others; this is what remains of them.
    """

    begin: int
    end: int
    step: int
    from_step: int
    reason: str
    spikes: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    sample_ids: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)

    def event(self) -> dict[str, Any]:
        """Return what the records of the run say about it."""
        return {"kind": "rollback", **dataclasses.asdict(self)}


def skipped_windows(folder: RunFolder) -> list[Window]:
    """Return the windows of a run, as rank 0 finds them; on all ranks together.

    Raises:
        ValueError: the file cannot be read.
    """
    found: list[Any] = [None, ""]
    if dist.get_rank() == 0:
        try:
            text = folder.skipped_data.read_text() if folder.skipped_data.exists() else "[]"
            found[0] = [Window(**entry) for entry in json.loads(text)]
        except (OSError, ValueError, TypeError) as e:
            found[1] = (
                f"{folder.skipped_data}: cannot be read ({e}); restore it, or remove it to train "
                "on the data that it leaves out"
            )
    dist.broadcast_object_list(found)
    if found[1]:
        raise ValueError(found[1])
    windows: list[Window] = found[0]
    return windows


def roll_back(c: Components, spikes: list[int]) -> Window | None:
    """Go back to the newest intact checkpoint before the first spike; on all ranks together.

    Returns:
        What is left out from now on; None when no checkpoint is older than the spikes.

    Raises:
        SpikeError: the run was there `spikes.max_rollbacks` times already.
        CheckpointError: none is intact, or the window cannot be written.
    """
    from launcher.resume import load

    checkpoint = c.store.newest_before(spikes[0])
    if checkpoint is None:
        return None
    windows = skipped_windows(c.folder)
    there = sum(window.step == checkpoint.step for window in windows)
    if there >= c.cfg.spikes.max_rollbacks:
        raise SpikeError(
            f"spikes at steps {spikes}, the last: {c.spikes.reason}; went back to step "
            f"{checkpoint.step} {there} times already"
        )
    begin, end = c.loader.data_step_of(checkpoint.meta["loader"]), c.loader.data_step
    per_step = c.loader.samples_per_step
    window = Window(
        begin,
        end,
        checkpoint.step,
        c.step,
        c.spikes.reason,
        list(spikes),
        [begin * per_step, end * per_step],
        c.loader.sample_ids(begin, end),
        # Rank 0's, as it writes them.
        [step for step in c.metrics.skipped if step > checkpoint.step],
    )
    # In this order; see the module's text.
    c.store.discard_after(checkpoint.step)
    c.store.together(lambda: _write(c.folder, [*windows, window]) if c.mesh.is_first else None)
    load(c, checkpoint)
    return window


def _write(folder: RunFolder, windows: list[Window]) -> None:
    text = json.dumps([dataclasses.asdict(window) for window in windows], indent=1)
    write_atomically(folder.skipped_data, text + "\n", durable=True)
