"""Saving a rank's state and going on from it: weights, optimizer, tables, data, generators."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from launcher.config import plain
from launcher.rollback import skipped_windows
from parallel.checkpoint import Checkpoint, CheckpointError, list_checkpoints, verify

if TYPE_CHECKING:
    from launcher.components import Components

DENSE, RANDOM = "dense", "random"
"""Kinds of tensors in a checkpoint, beside one per table."""


def save(c: Components) -> None:
    """Begin to write a checkpoint of step `c.step`; on all ranks together.

    Returns as soon as training may go on; `c.store.wait()` waits for the commit.

    Raises:
        CheckpointError: the checkpoint before could not be written; earlier ones are untouched.
    """
    c.store.wait(lambda: c.watchdog.beat(c.step, "checkpoint"))
    tables = sum(table.snapshot_bytes for table in c.tables.values())
    buffers = c.store.host_buffers(c.engine.snapshot_bytes + tables)
    dense, dense_meta = c.engine.snapshot(buffers)
    tensors, values = random_state(c.engine.device)
    shards: dict[str, Any] = {DENSE: dense, RANDOM: tensors}
    for name, table in c.tables.items():
        shards[table_kind(name)] = table.snapshot(buffers)
    if buffers is not None:
        buffers.wait()
    c.store.start(
        c.step,
        shards,
        {"dense": dense_meta, "random": values},
        {
            "step": c.step,
            "tokens": c.tokens,
            "loader": c.loader.state_dict(),
            "spikes": c.spikes.state_dict(),
            "run": c.cfg.name,
            "config": plain(c.cfg),
            "compute": "bf16" if c.engine.dtype == torch.bfloat16 else "fp32",
        },
        # A step whose line could still be lost must not be the one that a run goes on from.
        before_commit=c.metrics.flush,
        progress=lambda: c.watchdog.beat(c.step, "checkpoint"),
    )


def restore(c: Components) -> None:
    """Go on from the newest verified checkpoint; on all ranks together.

    A run without checkpoints starts at step 0. The number of ranks may differ from the one that
    saved. Newer checkpoints that are damaged are set aside.

    Raises:
        CheckpointError: checkpoints exist and none is intact.
    """
    checkpoint = c.store.newest()
    if checkpoint is not None:
        c.store.set_aside_newer(checkpoint)
        _go_on_from(c, checkpoint)


def restore_to_read(c: Components, step: int | None = None) -> None:
    """Load the newest verified checkpoint, or that of `step`, of a run that others may train.

    Raises:
        CheckpointError: there is none that is intact.
    """
    checkpoint = c.store.newest() if step is None else _of_step(c, step)
    if checkpoint is None:
        raise CheckpointError(f"{c.store.root}: no committed checkpoint, so there is no model yet")
    _go_on_from(c, checkpoint)


def _go_on_from(c: Components, checkpoint: Checkpoint) -> None:
    load(c, checkpoint)
    if c.mesh.is_first:
        print(_announcement(checkpoint, c), flush=True)


def load(c: Components, checkpoint: Checkpoint) -> None:
    """Put a verified checkpoint in place; on all ranks together. Sets `c.step` and `c.tokens`."""
    same_world = checkpoint.world == c.mesh.world
    saved_rank = c.mesh.rank if same_world else 0
    meta = checkpoint.rank_meta_of(saved_rank)
    c.engine.load_local_state(
        checkpoint.shard(DENSE, saved_rank),
        meta["dense"],
        lambda rank: checkpoint.shard(DENSE, rank),
    )
    for name, table in c.tables.items():
        ranks = checkpoint.ranks_with_rows_of(c.mesh.rank, c.mesh.world)
        table.load_shards(checkpoint.pieces(table_kind(name), ranks))
    if same_world:
        set_random_state(checkpoint.load(RANDOM), meta["random"], c.engine.device)
    c.loader.load_state_dict(checkpoint.meta["loader"])
    windows = skipped_windows(c.folder)
    c.loader.leave_out([(window.begin, window.end) for window in windows])
    if "spikes" in checkpoint.meta:
        c.spikes.load_state_dict(checkpoint.meta["spikes"])
    c.step, c.tokens = int(checkpoint.meta["step"]), int(checkpoint.meta["tokens"])
    # Told with the next step, in whatever process that comes.
    c.event = next((w.event() for w in reversed(windows) if w.step == c.step), None)


def _of_step(c: Components, step: int) -> Checkpoint:
    committed = [info for info in list_checkpoints(c.store.root) if info.committed]
    path = next((info.path for info in committed if info.step == step), None)
    if path is None:
        have = ", ".join(str(info.step) for info in committed) or "none"
        raise CheckpointError(f"{c.store.root}: no checkpoint of step {step}; committed: {have}")
    problems = verify(path)
    if problems:
        raise CheckpointError(f"checkpoint of step {step} is not intact: {problems[0]}")
    return Checkpoint(path, c.mesh.rank)


def _announcement(checkpoint: Checkpoint, c: Components) -> str:
    passed = "".join(f"\npassed over: {text}" for text in checkpoint.passed_over)
    ranks = "" if checkpoint.world == c.mesh.world else f", saved by {checkpoint.world} ranks"
    return f"resuming from step {checkpoint.step} ({checkpoint.path}{ranks}){passed}"


def table_kind(name: str) -> str:
    """Return the kind under which a table's rows are saved."""
    return f"table-{name}"


def random_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of every random generator of this process, as tensors and JSON values."""
    state: Any = np.random.get_state(legacy=False)
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(state["state"]["key"].astype(np.int64)),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    version, internal, gauss_next = random.getstate()
    values = {
        "python": [version, list(internal), gauss_next],
        "numpy": [int(state["state"]["pos"]), int(state["has_gauss"]), float(state["gauss"])],
    }
    return tensors, values


def set_random_state(
    tensors: dict[str, Tensor], values: dict[str, Any], device: torch.device
) -> None:
    """Put every generator back to what `random_state` returned."""
    torch.set_rng_state(tensors["torch"].cpu())
    # A run that moves from a CPU to a GPU goes on with the generator that its seed gave it.
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"].cpu(), device)
    position, has_gauss, gauss = values["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": position},
            "has_gauss": has_gauss,
            "gauss": gauss,
        }
    )
    version, internal, gauss_next = values["python"]
    random.setstate((version, tuple(internal), gauss_next))
