"""What `tiny-onn bench tables` measures: a dense model that trains without a table, or with one.

The ids are words of the standard library's own text, numbered by frequency, in short spans drawn
from all over it: Zipf as text has it.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sysconfig
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import Documents
from parallel.engine import Engine, EngineConfig, OffloadConfig, OptimizerConfig
from parallel.mesh import Mesh
from parallel.schedule import ScheduleConfig
from parallel.tables import RowTable
from tiny_onn.attention import AttentionConfig
from tiny_onn.deepembed import DeepEmbedConfig
from tiny_onn.dynmoe_config import DynMoeConfig
from tiny_onn.modular import ModelConfig, TinyOnn

DOCUMENT = 1024


def text_ids(vocab: int, stop_bytes: int = 40_000_000) -> Tensor:
    """Return the words of the standard library's text as ids by frequency, int64."""
    words: list[str] = []
    read = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts and read < stop_bytes:
            text = path.read_text(errors="ignore")
            read += len(text)
            words += re.findall(r"\w+", text)
    rank = {word: i for i, (word, _) in enumerate(Counter(words).most_common())}
    return torch.tensor([rank[word] % vocab for word in words])


class Batches:
    """Batches of a rank by step: `tokens` ids in spans of `span` words from anywhere."""

    def __init__(self, ids: Tensor, tokens: int, span: int, rank: int) -> None:
        self._ids, self._tokens, self._span, self._rank = ids, tokens, span, rank
        self._ready: dict[int, Tensor] = {}

    def prepare(self, first: int, count: int) -> None:
        """Draw the batches of some steps now, so that it does not count as a step's time."""
        self._ready = {step: self.draw(step) for step in range(first, first + count)}

    def at(self, step: int) -> Tensor:
        """Return the ids of a step, int64 [tokens]."""
        ready = self._ready.get(step)
        return self.draw(step) if ready is None else ready

    def draw(self, step: int) -> Tensor:
        """Draw the ids of a step anew."""
        generator = torch.Generator().manual_seed(10_007 * step + self._rank)
        count = -(-self._tokens // self._span)
        starts = torch.randint(self._ids.shape[0] - self._span, (count,), generator=generator)
        return self._ids[(starts[:, None] + torch.arange(self._span)).reshape(-1)[: self._tokens]]


@dataclasses.dataclass
class Subject:
    """An engine, perhaps with a table, that takes steps.

    Attributes:
        engine: of the model.
        table: rows beside it; None where there is none.
        spread: the table sees every id times this, as if the vocabulary were so much larger.
    """

    engine: Engine
    batches: Batches
    table: RowTable | None = None
    spread: int = 1
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    next_step: int = 0
    loss: float = 0.0

    def step(self) -> Tensor:
        """Take one optimizer step; returns the loss, fp32 0-dim."""
        engine, table, device = self.engine, self.table, self.engine.device
        ids_T = self.batches.at(self.next_step)
        labels_T = torch.cat((ids_T[1:], torch.tensor([-100])))
        tokens = ids_T.shape[0]
        documents = [DOCUMENT] * (tokens // DOCUMENT)
        if tokens % DOCUMENT:
            documents.append(tokens % DOCUMENT)
        scale = torch.tensor(1.0 / tokens, device=device)
        self.next_step += 1
        layers = index = rows = None
        start = time.perf_counter()

        def lap(part: str) -> None:
            nonlocal start
            now = time.perf_counter()
            self.seconds[part] = self.seconds.get(part, 0.0) + now - start
            start = now

        if table is not None:
            rows = table.fetch(ids_T * self.spread)
            layers, index = rows.parts, rows.lookup
            lap("fetch")
            table.prefetch(self.batches.at(self.next_step) * self.spread)
            lap("prefetch")
        output = engine.forward(
            ids_T.to(device),
            labels_T.to(device),
            Documents(documents, device),
            scale,
            layers,
            index,
        )
        lap("forward")
        engine.backward(output.loss)
        lap("backward")
        if table is not None and rows is not None:
            table.accumulate(rows)
            lap("accumulate")
        engine.step()
        lap("step")
        loss: Tensor = output.nll_sum * scale
        return loss

    def warm(self, steps: int) -> None:
        """Touch the rows of `steps` batches, so that a cache is as full as in a long run."""
        table = self.table
        assert table is not None
        for _ in range(steps):
            rows = table.fetch(self.batches.at(self.next_step) * self.spread)
            self.next_step += 1
            table.accumulate(rows)
            table.step(0.0)
        table.flush()

    def turn(self, steps: int) -> dict[str, Any]:
        """Take one step, then `steps` more on the clock.

        Returns:
            "seconds" of a step on average, "steps": seconds of every step, "peak" bytes on the
            device, "host PART" and "thread KIND" seconds of a step, and the table's numbers.
        """
        engine = self.engine
        engine.tables = () if self.table is None else (self.table,)
        module: Any = engine.module
        plain = dataclasses.replace(module.cfg.deepembed, kind="off")
        before = module.cfg
        if self.table is None and before.deepembed.partition == "rows":
            module.cfg = dataclasses.replace(before, deepembed=plain)
        self.batches.prepare(self.next_step, steps + 2)
        ends: list[float] = []
        try:
            self.step()
            _synchronise(engine.device)
            self.seconds.clear()
            busy = {} if self.table is None else dict(self.table.busy_seconds)
            if engine.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(engine.device)
            start = time.perf_counter()
            for _ in range(steps):
                loss = self.step()
                ends.append(time.perf_counter())
            _synchronise(engine.device)
            seconds = (time.perf_counter() - start) / steps
        finally:
            module.cfg = before
        self.loss = float(loss)
        each = [b - a for a, b in zip([start, *ends[:-1]], ends, strict=True)]
        found: dict[str, Any] = {"seconds": seconds, "steps": each, "peak": _peak(engine.device)}
        found |= {f"host {part}": total / steps for part, total in self.seconds.items()}
        if self.table is not None:
            self.table.flush()
            for kind, total in self.table.busy_seconds.items():
                found[f"thread {kind}"] = (total - busy.get(kind, 0.0)) / steps
            found |= {k: float(v) for k, v in self.table.stats.items()}
        return found


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> float:
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else 0.0


def model_config(a: argparse.Namespace, deepembed: DeepEmbedConfig) -> ModelConfig:
    """Return the dense model of the benchmark."""
    heads = max(1, a.width // 128)
    return ModelConfig(
        vocab_size=a.vocab,
        width=a.width,
        layers=a.layers,
        tie_embeddings=False,
        activation_checkpointing=True,
        attention=AttentionConfig(
            kind="full", heads=heads, groups=heads, head_dim=min(128, a.width)
        ),
        ffn=DynMoeConfig(kind="dense", dense_hidden=8 * a.width // 3 // 64 * 64),
        deepembed=deepembed,
    )


def build_engine(
    a: argparse.Namespace, mesh: Mesh, deepembed: DeepEmbedConfig, offload: str = "none"
) -> Engine:
    """Return an engine of the model; a collective call."""
    torch.manual_seed(0)
    return Engine(
        lambda: TinyOnn(model_config(a, deepembed)),
        EngineConfig(
            optimizer=OptimizerConfig(lr=3e-4),
            schedule=ScheduleConfig(warmup=10),
            offload=OffloadConfig(optimizer=offload),  # type: ignore[arg-type]
        ),
        mesh,
        total_steps=100_000,
    )


def table_config(a: argparse.Namespace, variant: str, spread: int) -> DeepEmbedConfig:
    """Return the configuration of a variant's table."""
    if variant.startswith("zero3"):
        return DeepEmbedConfig(partition="zero3")
    tier: Any = variant.removeprefix("rows-")
    return DeepEmbedConfig(
        tier=tier,
        kernel=a.kernel,
        keep_output=a.keep_output,
        threads=a.threads,
        nvme_path=a.nvme,
        cache_rows=round(a.cache * a.vocab * spread / int(os.environ.get("WORLD_SIZE", "1"))),
    )
