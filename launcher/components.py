"""Everything that a rank of a run consists of, built in the order of dependence."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.index import TOKENIZER
from data.loader import Batch, PackedLoader
from data.tokenizer import Tokenizer
from kernels import Documents
from kernels.transfer import to_device
from launcher.config import RunConfig, dump
from launcher.flops import Shape, flops_per_token
from launcher.lifecycle import RunFolder, StopRequest
from launcher.metrics import Metrics
from launcher.progress import StepProgress
from launcher.spikes import SpikeWatch
from launcher.watchdog import Watchdog
from parallel.checkpoint import CheckpointStore
from parallel.engine import Engine
from parallel.group_exchange import GroupExchange, require_degree
from parallel.mesh import Mesh, init_mesh
from parallel.tables import Rows, RowTable
from tiny_onn.modular import ModelConfig, ModelOutput, TinyOnn

SILENT = -1
"""A rank that records nothing."""


@dataclass
class Components:
    """What one rank of a run works with.

    Attributes:
        cfg: the resolved configuration.
        folder: the run folder.
        mesh: place of this rank.
        tokenizer: of the corpus.
        loader: hands out training and validation batches.
        table: rows dealt over the ranks, of DeepEmbed and perhaps the input embedding; None when
            both are off or partitioned by ZeRO-3.
        engine: the model under DeepSpeed.
        store: checkpoints.
        metrics: what is recorded; does nothing on ranks other than 0.
        stop: whether the run was asked to stop.
        watchdog: ends this process when nothing moves any more.
        step: optimizer steps done.
        tokens: tokens seen.
        spikes: judges every step before it is applied.
        event: what the next step's record has to tell beside the step.
    """

    cfg: RunConfig
    folder: RunFolder
    mesh: Mesh
    tokenizer: Tokenizer
    loader: PackedLoader
    table: RowTable | None
    engine: Engine
    store: CheckpointStore
    metrics: Metrics
    stop: StopRequest
    watchdog: Watchdog
    spikes: SpikeWatch
    step: int = 0
    tokens: int = 0
    event: dict[str, Any] | None = None

    def fetch_rows(self, ids_T: Tensor) -> Rows | None:
        """Return the DeepEmbed rows of these tokens, None without a table; a collective call."""
        return None if self.table is None else self.table.fetch(ids_T)

    def forward(self, batch: Batch, rows: Rows | None, loss_scale: Tensor) -> ModelOutput:
        """Run the model on a batch of this rank, together with the ranks that share it."""
        device = self.engine.device
        output = self.engine.forward(
            to_device(batch.ids_T, device),
            to_device(batch.labels_T, device),
            Documents(batch.lengths, device),
            loss_scale,
            None if rows is None else rows.parts,
            None if rows is None else rows.lookup,
        )
        assert isinstance(output, ModelOutput)
        return output

    def label_bytes(self, labels_T: Tensor) -> int:
        """Count the UTF-8 bytes that the labels stand for; unlabelled tokens count nothing."""
        labels = labels_T[labels_T >= 0].numpy()
        return int(self.tokenizer.token_bytes[labels].sum())

    @property
    def tables(self) -> dict[str, RowTable]:
        """Tables by name."""
        return {} if self.table is None else {self.table.name: self.table}

    def close(self) -> None:
        """Close every file and thread."""
        self.stop.finish()
        self.store.close()
        self.watchdog.close()
        self.metrics.close()
        self.loader.close()
        self.engine.close()
        if self.table is not None:
            self.table.close()


def shape_of(cfg: ModelConfig, seq_len: int) -> Shape:
    """Return the numbers from which the arithmetic of the model is counted."""
    a, f = cfg.attention, cfg.ffn
    dense = f.kind == "dense"
    return Shape(
        layers=cfg.layers,
        width=cfg.width,
        vocab=cfg.vocab_size,
        seq_len=seq_len,
        heads=a.heads,
        groups=a.groups,
        head_dim=a.head_dim,
        attention=a.kind,
        shared_kv=a.shared_kv,
        learned_compression=a.compression == "linear",
        compress_block=a.compress_block,
        compress_stride=a.compress_stride,
        select_block=a.select_block,
        selected=a.selected,
        window=a.window,
        ffn=f.kind,
        hidden=f.hidden_width(),
        experts=1 if dense else f.experts,
        target_experts=1.0 if dense else f.target_experts,
        shared_hidden=f.expert_hidden if f.shared_expert and not dense else 0,
        gated=f.activation == "swiglu",
        tied=cfg.tie_embeddings,
        qk_norm=a.qk_norm,
        deepembed=cfg.deepembed.kind,
    )


def seed_everything(seed: int, rank: int) -> None:
    """Seed every generator of this process; the ranks differ, so that exploration does."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)


def accumulation(cfg: RunConfig, world: int, local_world: int) -> int:
    """Return micro-batches per rank and step, after checking that ranks and batch fit together.

    Args:
        cfg: the configuration.
        world: ranks of the job.
        local_world: ranks of one machine.

    Raises:
        ValueError: mesh.group cannot be, or the batch does not divide.
    """
    group = cfg.mesh.group
    require_degree(group, cfg.model.attention.groups, world, local_world)
    if cfg.train.micro_batch * cfg.data.seq_len < group:
        raise ValueError(
            f"train.micro_batch {cfg.train.micro_batch} x data.seq_len {cfg.data.seq_len} tokens "
            f"leave some of mesh.group {group} ranks without a token; make the group smaller"
        )
    data = world // group
    per_pass = cfg.train.micro_batch * data
    if cfg.train.global_batch % per_pass:
        of = f"groups of {group} ranks" if group > 1 else "ranks"
        raise ValueError(
            f"train.global_batch {cfg.train.global_batch} is no multiple of train.micro_batch "
            f"{cfg.train.micro_batch} x {data} {of}; set it to a multiple of {per_pass}"
        )
    return cfg.train.global_batch // per_pass


def build(cfg: RunConfig, folder: RunFolder, checkpoints: Path | None = None) -> Components:
    """Build one rank's components, before any checkpoint is loaded; a collective call.

    Args:
        cfg: the resolved configuration.
        folder: where heartbeat, logs and requests to stop are.
        checkpoints: those of another folder than `folder` (evaluation beside a running run).
    """
    stop = StopRequest(folder)
    mesh = stop.mesh = init_mesh(group=cfg.mesh.group)
    watchdog = Watchdog(folder, cfg.launch, mesh.rank).start()
    micro_batches = accumulation(cfg, mesh.world, mesh.local_world)
    loader = PackedLoader(
        cfg.data,
        micro_batch=cfg.train.micro_batch,
        accumulation=micro_batches,
        rank=mesh.data_rank,
        world=mesh.data,
        part=mesh.group_rank,
        parts=mesh.group,
    )
    tokenizer = loader.tokenizer
    model = cfg.model
    # Every rank draws the same weights: ZeRO-3 keeps a part of each.
    seed_everything(cfg.seed, 0)
    table = None
    if model.row_parts:
        table = RowTable(
            "deepembed",
            model.vocab_size,
            model.row_width,
            mesh,
            model.deepembed,
            dtype=cfg.engine.dtype(mesh.device),
            groups=model.row_parts,
            ids_from=f"{cfg.data.path}/{TOKENIZER} ({tokenizer.size:,} ids)",
        )
        if model.embedding_partition == "rows":
            table.draw_part(0, model.init_std, cfg.seed)
    exchange = GroupExchange(mesh, model.attention.groups) if mesh.group > 1 else None
    engine = Engine(
        lambda: TinyOnn(model, exchange, cfg.data.seq_len),
        dataclasses.replace(cfg.engine, accumulation=micro_batches),
        mesh,
        total_steps=cfg.train.steps,
        run=cfg.name if checkpoints is None else f"{cfg.name}-evaluation",
        tables=[table] if table is not None else [],
    )
    seed_everything(cfg.seed, 1 + mesh.rank)
    store = CheckpointStore(checkpoints or folder.checkpoints, mesh, cfg.checkpoint)
    stop.save_failed = lambda: store.failed
    metrics = Metrics(folder.root, rank=SILENT)
    return Components(
        cfg,
        folder,
        mesh,
        tokenizer,
        loader,
        table,
        engine,
        store,
        metrics,
        stop,
        watchdog,
        SpikeWatch(cfg.spikes),
    )


def open_metrics(c: Components) -> None:
    """Open the run's records to go on after `c.step` (rank 0 writes)."""
    progress = StepProgress(
        c.cfg.train.steps,
        rank=c.mesh.rank,
        first_step=c.step,
        log_file=c.folder.logs / "train.log",
    )
    c.metrics = Metrics(
        c.folder.root,
        rank=c.mesh.rank,
        resume_step=c.step,
        configuration=dump(c.cfg),
        progress=progress,
    )


def active_flops(cfg: RunConfig) -> float:
    """Return active floating point operations of one token, forward and backward."""
    return sum(flops_per_token(shape_of(cfg.model, cfg.data.seq_len)).values())
