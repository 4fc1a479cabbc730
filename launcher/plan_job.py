"""A job that is planned: the configuration, the machines, and the counts that follow from both.

Letters beside those of the model: n parameters outside the tables, W ranks, P ranks that share a
sequence, R = min(P, G) ranks among which heads are dealt out, m = P / R, T tokens that a group
attends over in a pass, t = T / P those of one rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch

from kernels.experts.spec import MEASURED, RouteSpec
from launcher.components import accumulation, shape_of
from launcher.config import RunConfig
from launcher.flops import ParameterCounts, Shape, parameter_counts
from launcher.word_law import expected_unique
from parallel.group_exchange import shard_edges
from parallel.table_layout import RowLayout

GIB = 2**30

EFFICIENCY: Mapping[str, float] = {
    "attention_projections": 0.60,
    "dense_ffn": 0.60,
    "head": 0.50,
    "router": 0.10,
    "experts": 0.40,
    "compression": 0.15,
    "attention_full": 0.50,
    "attention_compressed": 0.30,
    "attention_scoring": 0.25,
    "attention_selected": 0.14,
    "attention_window": 0.25,
}
"""Share of the bf16 peak that each component of `launcher.flops` reaches, from measurements of the
kernels on one H100 (NOTES.md); `--measured` corrects their sum."""


@dataclass(frozen=True)
class Machine:
    """What a node of the cluster can do; the defaults are a node of H100 SXM with 400 Gb/s a GPU.

    Attributes:
        gpu_gib: memory of a GPU.
        host_gib: memory of a node.
        peak_flops: bf16 peak of a GPU, FLOP/s.
        hbm: memory bandwidth of a GPU, bytes/s.
        nvlink: bytes/s that a GPU receives from its node's GPUs in large collectives.
        network: bytes/s that a GPU receives from other nodes in large collectives.
        pcie: bytes/s between a GPU and host memory, each way.
        host_memory: bytes/s of a node's memory that a host-side optimizer reaches.
        hop: seconds that a message needs to another node; within one a tenth of it.
        block_seconds: host time to launch a compiled dense block's forward and backward: a floor
            for the time of its kernels, as are the next four.
        eager_seconds: what a block that is not compiled adds.
        nsa_seconds: what NSA adds.
        dynmoe_seconds: what DynMoE with its table adds.
        gathered_seconds: what ZeRO-3's hooks add where weights do not stay whole.
        reserve: share of a GPU's memory lost to fragmentation, the CUDA context and NCCL.
        efficiency: see `EFFICIENCY`.
    """

    gpu_gib: float = 80.0
    host_gib: float = 1024.0
    peak_flops: float = 989e12
    hbm: float = 2.8e12
    nvlink: float = 300e9
    network: float = 40e9
    pcie: float = 50e9
    host_memory: float = 250e9
    hop: float = 8e-6
    block_seconds: float = 0.0045
    eager_seconds: float = 0.0015
    nsa_seconds: float = 0.006
    dynmoe_seconds: float = 0.002
    gathered_seconds: float = 0.004
    reserve: float = 0.08
    efficiency: Mapping[str, float] = field(default_factory=lambda: dict(EFFICIENCY))


@dataclass(frozen=True)
class Job:
    """A configuration on so many machines.

    Attributes:
        cfg: the configuration, its vocabulary resolved.
        nodes: machines.
        per_node: GPUs (and ranks) of one machine.
        machine: what a machine can do.
    """

    cfg: RunConfig
    nodes: int
    per_node: int
    machine: Machine = field(default_factory=Machine)

    @property
    def world(self) -> int:
        """W."""
        return self.nodes * self.per_node

    @property
    def group(self) -> int:
        """P."""
        return self.cfg.mesh.group

    @cached_property
    def micro_batches(self) -> int:
        """Passes of a rank per step; raises ValueError when ranks and batch do not fit."""
        return accumulation(self.cfg, self.world, self.per_node)

    @cached_property
    def shape(self) -> Shape:
        """The model's numbers."""
        return shape_of(self.cfg.model, self.cfg.data.seq_len)

    @cached_property
    def counts(self) -> ParameterCounts:
        """Parameters by component."""
        return parameter_counts(self.shape)

    @property
    def zero3_table(self) -> bool:
        """Whether the DeepEmbed table is an ordinary parameter."""
        return self.counts.table > 0 and self.cfg.model.deepembed.partition == "zero3"

    @property
    def parameters(self) -> int:
        """n: what ZeRO-3 partitions."""
        in_rows = self.counts.total["embedding"] * (self.cfg.model.embedding_partition == "rows")
        table = self.counts.table if self.zero3_table else 0
        return sum(self.counts.total.values()) - in_rows + table

    @property
    def block_parameters(self) -> int:
        """Parameters of one block."""
        outside = ("embedding", "head")
        inside = sum(v for k, v in self.counts.total.items() if k not in outside)
        return inside // self.shape.layers

    @property
    def partition(self) -> int:
        """Parameters that a rank owns, ceil(n / W)."""
        return math.ceil(self.parameters / self.world)

    @property
    def resident(self) -> bool:
        """Whether every rank keeps all weights (`engine.zero.resident_gib`)."""
        return self.cfg.engine.keeps_resident(self.parameters, torch.bfloat16, self.world)

    @property
    def tokens(self) -> int:
        """T: tokens that a group attends over in a pass."""
        return self.cfg.train.micro_batch * self.cfg.data.seq_len

    @property
    def shard(self) -> int:
        """t: tokens of a rank in a pass, the largest share."""
        return math.ceil(self.tokens / self.group)

    @property
    def row(self) -> int:
        """R: ranks among which heads are dealt out."""
        return min(self.group, self.shape.groups)

    @property
    def column(self) -> int:
        """m: ranks that hold the same KV groups."""
        return self.group // self.row

    @cached_property
    def spans(self) -> list[list[tuple[int, int]]]:
        """For each of the m rows its queries [first, stop) in every sequence that it has some of.

        Every sequence is taken for one document, as the mean of the arithmetic takes it.
        """
        S = self.cfg.data.seq_len
        edges = shard_edges(self.tokens, self.group)[:: self.row]
        return [
            [
                (max(low, at) - at, min(high, at + S) - at)
                for at in range(low // S * S, high, S)
            ]
            for low, high in pairwise(edges)
        ]  # fmt: skip

    @property
    def queries(self) -> int:
        """Queries that the attention kernels of the fullest rank work through in a pass.

        NSA's kernels begin where a document does: a row whose queries begin inside of one gives
        them queries of zero for the tokens in front, and keeps their results like any other
        (`kernels.nsa.part`). So beyond G groups the last row works through the whole sequence.
        """
        padded = self.shape.attention == "nsa"
        return max(sum(b - (0 if padded else a) for a, b in row) for row in self.spans)

    @property
    def heads(self) -> int:
        """Query heads of a rank in attention, H / R."""
        return self.shape.heads // self.row

    @property
    def kv_groups(self) -> int:
        """KV groups of a rank in attention, G / R."""
        return self.shape.groups // self.row

    @property
    def pairs(self) -> int:
        """Rows of the expert layer's buffers: any routing of t tokens fits in (static)."""
        ffn = self.cfg.model.ffn
        if ffn.kind == "dense":
            return self.shard
        stride = ffn.explore_stride if ffn.surprise != "off" else 0
        # The scales of the scores do not matter here.
        route = RouteSpec(
            1.0, 0.0, *ffn.fired_bounds, stride=stride, sequence=self.cfg.data.seq_len
        )
        return route.capacity(self.shard, ffn.experts, MEASURED.align)

    @property
    def inner(self) -> int:
        """Numbers before the activation per pair: 2F gated, else F."""
        return self.shape.hidden * (2 if self.shape.gated else 1)

    @cached_property
    def table_columns(self) -> int:
        """Fp32 numbers that a row of the table and its optimizer state take; 0 without a table."""
        model = self.cfg.model
        if not model.row_parts:
            return 0
        return RowLayout.of(model.deepembed.optimizer, model.row_width, model.row_parts).columns

    @property
    def row_width(self) -> int:
        """Numbers of an id's row that a pass looks up, wherever the table is."""
        table = self.counts.table_active if self.zero3_table else 0
        return self.cfg.model.row_width + table

    @cached_property
    def unique_ids(self) -> int:
        """Expected distinct ids among t tokens, by the law of `word_law`."""
        return expected_unique(self.shape.vocab, self.shard)
