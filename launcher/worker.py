"""One rank of a run: `python -m launcher.worker CONFIG.yaml train|evaluate|follow|generate [JSON]`.

Started by `launcher.ranks`, never by hand.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher import config
from launcher.components import Components, build
from launcher.evaluate import text_sample, validate
from launcher.follow import Follower
from launcher.lifecycle import RunFolder
from launcher.redact import guard_output, redact
from launcher.resume import restore_to_read
from launcher.train import Trainer
from parallel.checkpoint import CheckpointError
from parallel.checkpoint_files import write_error
from parallel.deepspeed_env import DeepSpeedError
from parallel.mesh import MeshError
from parallel.table_layout import TableError
from parallel.zero_setup import EngineError
from tiny_onn.generation import Sampling


def train(cfg: config.RunConfig, folder: RunFolder) -> None:
    """Train until the end or a request to stop; marks the run done at the end."""
    trainer = Trainer(cfg, folder)
    outcome = trainer.train()
    trainer.c.close()
    dist.barrier()
    if outcome == "done" and trainer.c.mesh.rank == 0:
        folder.mark_done(trainer.c.step)


def follow(cfg: config.RunConfig, run: RunFolder, arguments: dict[str, Any]) -> None:
    """Evaluate the checkpoints of a run, those to come too; says in a file when nothing is left."""
    own = RunFolder(run.root / "evaluation").create()
    held = own.root / "held"
    held.mkdir(exist_ok=True)
    c = build(cfg, own, held)
    follower = Follower(c, run, held, int(arguments["sequences"]))
    why = follower.follow(bool(arguments["until_done"]), float(arguments["patience"]))
    asked_to_stop = bool(c.stop.local())
    c.close()
    if c.mesh.is_first:
        print(why, flush=True)
        if not asked_to_stop:
            (own.logs / f"{own.attempt}.finished").write_text(f"{why}\n")


def evaluate(c: Components, arguments: dict[str, Any]) -> str:
    """Return the validation of a checkpoint as a JSON line."""
    result = validate(c, int(arguments.get("sequences", 0)))
    return json.dumps({"step": c.step, **result.__dict__})


def generate(c: Components, arguments: dict[str, Any]) -> str:
    """Return text from a checkpoint."""
    sampling = Sampling(
        float(arguments["temperature"]), float(arguments["top_p"]), int(arguments["seed"])
    )
    return text_sample(c, str(arguments["prompt"]), int(arguments["tokens"]), sampling)


EXPECTED = (
    ValueError,
    OSError,
    CheckpointError,
    DeepSpeedError,
    EngineError,
    MeshError,
    TableError,
)
"""Errors whose message says what was found and what to do: a traceback would only hide that."""


LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
"""What a collective call over TCP says when the process at the other end is gone."""


DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""What the disk of a run's folder answers when nothing can be written there any more."""


def main(argv: Sequence[str]) -> int:
    """Run one rank; returns its exit code."""
    guard_output()
    try:
        return run(argv)
    except EXPECTED as e:
        if isinstance(e, OSError) and e.errno in DISK_ERRORS:
            # Some writers (logs, TensorBoard) do not say which of the run's files it was.
            e = write_error(Path(e.filename or Path(argv[0]).parents[1]), e)
        _end(argv, str(e))
    except RuntimeError as e:
        if not any(text in str(e) for text in LOST_PEER):
            _crash()
        _end(argv, "lost the connection to another rank; the one that ended first says why")
    except Exception:
        _crash()
    return 1


def _end(argv: Sequence[str], message: str) -> None:
    """Say what ended this rank, keep the traceback in a file, and exit with 1."""
    rank, attempt = os.environ.get("RANK", "0"), os.environ.get("TINY_ONN_TRY", "")
    where = Path(argv[0]).parent / f"{attempt}-rank{rank}.traceback"
    with contextlib.suppress(OSError):
        where.write_text(redact(traceback.format_exc()))
    print(redact(f"rank {rank}: {message}\n(traceback: {where})"), file=sys.stderr, flush=True)
    # Threads of libraries that wait for a peer must not keep the process.
    os._exit(1)


def _crash() -> None:
    """Show the traceback of an error that nobody expected, and exit with 1."""
    print(redact(traceback.format_exc()), file=sys.stderr, flush=True)
    os._exit(1)


def run(argv: Sequence[str]) -> int:
    """Run one rank."""
    cfg = config.load(Path(argv[0]))
    # Where the run lies now: it may have been moved or copied since it was configured.
    folder = RunFolder(Path(argv[0]).parent)
    if argv[1] == "train":
        train(cfg, RunFolder(Path(cfg.runs) / cfg.name))
    elif argv[1] == "follow":
        follow(cfg, folder, json.loads(argv[2]))
    else:
        arguments = json.loads(argv[2])
        c = build(cfg, RunFolder(folder.root / "evaluation").create(), folder.checkpoints)
        restore_to_read(c, arguments.get("step"))
        text = {"evaluate": evaluate, "generate": generate}[argv[1]](c, arguments)
        c.close()
        if c.mesh.rank == 0:
            print(text, flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
