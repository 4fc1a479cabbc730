"""One optimizer step as numbers: the line of `metrics.jsonl` and the scalars of TensorBoard."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch


@dataclass
class StepRecord:
    """One optimizer step, as all ranks together saw it.

    Attributes:
        step: optimizer steps done, this one included (the first is 1).
        loss: mean cross entropy, nats per label.
        bits_per_byte: the same per UTF-8 byte of the labels, bits.
        lr: learning rate of the step.
        tokens: tokens seen since the start of the run.
        tokens_per_s: tokens of this step per second of the step, all ranks.
        grad_norm: global norm before clipping.
        skipped: the step was not applied (see `launcher.spikes`).
        sample_cursor: place in the run's order of samples: those consumed since the start, and
            those left out.
        seconds: wall seconds by part: data, forward, backward, optimizer; checkpoint, for which
            the loop waited since the step before; checkpoint_write, the whole time of a checkpoint
            whose writing beside the steps ended meanwhile.
        memory_bytes: peak of rank 0's GPU, or resident memory of its process.
        mfu: model FLOP utilisation 0 … 1, None on a CPU.
        sample_ids: which samples the step trained on, when worth keeping.
        event: what happened beside the step: its "kind" (skipped, rollback) and more.
        tables: numbers of the row tables by name (unique_rows, bytes_moved …), all ranks.
        extra: further scalars (the shares of `launcher.stragglers`, of the step before); a name
            with a slash is its tag, others go to `train/`.
    """

    step: int
    loss: float
    bits_per_byte: float
    lr: float
    tokens: int
    tokens_per_s: float
    grad_norm: float
    skipped: bool = False
    sample_cursor: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    memory_bytes: int = 0
    mfu: float | None = None
    sample_ids: list[int] | None = None
    event: dict[str, Any] | None = None
    tables: dict[str, float] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Return the JSON object of the step; what is not there is left out."""
        row = dataclasses.asdict(self)
        return {k: v for k, v in row.items() if v is not None and v != {}}

    def scalars(self) -> dict[str, float]:
        """Return the TensorBoard scalars of the step by tag."""
        out = {
            "train/loss": self.loss,
            "train/bits_per_byte": self.bits_per_byte,
            "train/lr": self.lr,
            "train/grad_norm": self.grad_norm,
            "train/tokens": float(self.tokens),
            "speed/tokens_per_s": self.tokens_per_s,
            "speed/memory_gib": self.memory_bytes / 2**30,
        }
        if self.mfu is not None:
            out["speed/mfu"] = self.mfu
        out |= {f"time/{part}": value for part, value in self.seconds.items()}
        out |= {f"tables/{name}": float(value) for name, value in self.tables.items()}
        out |= {k if "/" in k else f"train/{k}": float(v) for k, v in self.extra.items()}
        return out


def memory_bytes(device: torch.device) -> int:
    """Return the peak of allocated GPU memory, or this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
