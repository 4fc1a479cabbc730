"""Memory of a planned job by component, in bytes: of the fullest GPU, and of a node's host.

Letters as in `plan_job`; c bytes of the compute type (2), C width, L layers, D head dim, h and g
heads and groups of a rank in attention, b branches with K and V of their own, F expert hidden.
"""

from __future__ import annotations

import math

from launcher.plan_job import Job
from parallel.table_snapshot import COPIES_SHARE
from tiny_onn.activations import checkpointing_of

COMPUTE = 2
"""c: bytes of a bf16 number."""

PARTIAL_ROWS = 8 << 20
"""Rows of the selected branch's partial results that are held at once."""

PIECE = 512
"""Queries of a selected block whose gradients one program adds up."""

SCORED = 4096
"""Queries whose block importances are held at once."""

PROCESS_BYTES = 4 << 30
"""Host memory of a rank's Python, CUDA context, loader and staging buffers."""


def states(job: Job) -> dict[str, float]:
    """What a GPU holds throughout a step.

    weights: c·n/W. gathered: all of them where they stay (zero.resident_gib), else those in use,
    bounded by zero.max_live_parameters and by what is used again within zero.max_reuse_distance
    (nothing is copied where W = 1). gradients: 4·n/W (summed in fp32), and on their way buckets of
    (c + 4) bytes, or with weights that stay c bytes of a block and of what is outside of the
    blocks, and two blocks' and the outside's reductions of 4·(1 + 1/W) bytes. optimizer: 12·n/W
    (fp32 weight, two moments). table: rows of the device tier.
    """
    n, part = job.parameters, job.partition
    zero, offload = job.cfg.engine.zero, job.cfg.engine.offload
    ahead = zero.prefetch_bucket_size + 2 * job.block_parameters
    live = min(n, zero.max_live_parameters, max(ahead, zero.max_reuse_distance // 2))
    moving = (COMPUTE + 4.0) * min(zero.reduce_bucket_size, n)
    if job.resident:
        live = n
        outside = n - job.block_parameters * job.shape.layers
        moving = float(COMPUTE * (job.block_parameters + outside))
        if job.world > 1:
            moving += 4.0 * (1 + 1 / job.world) * (2 * job.block_parameters + outside)
    on_device = job.table_columns > 0 and job.cfg.model.deepembed.tier == "device"
    rows = math.ceil(job.shape.vocab / job.world)
    return {
        "weights": float(COMPUTE * part) if offload.params == "none" else 0.0,
        "weights gathered": float(COMPUTE * live) if job.world > 1 else 0.0,
        "gradients": (4.0 * part if offload.optimizer == "none" else 0.0) + moving,
        "optimizer": 12.0 * part if offload.optimizer == "none" else 0.0,
        "table": 4.0 * rows * job.table_columns if on_device else 0.0,
    }


def attention_saved(job: Job) -> float:
    """What autograd keeps of a block's attention.

    Norm: input in fp32 and output, (4 + c)·t·C. Projections before q and k are normalised (fp32
    copies): c·t·(H + 2bG)·D + 4·t·(H + bG)·D. What attention works on: c·(q·h + T·2bg)·D, q queries
    (`Job.queries`). NSA: the branches' outputs 3c·q·h·D, 3 log-sum-exps in fp32, compressed keys
    and values, 2·4 bytes per selected block, gates; full attention: its output and log-sum-exp.
    Output before the last projection: c·t·H·D.
    """
    s, c = job.shape, COMPUTE
    t, T, q = job.shard, job.tokens, job.queries
    b, D = s.kv_branches, s.head_dim
    h, g = job.heads, job.kv_groups
    norm = (4 + c) * t * s.width
    projected = c * t * (s.heads + 2 * b * s.groups) * D
    if s.qk_norm:
        projected += 4 * t * (s.heads + b * s.groups) * D
    worked_on = c * D * (q * h + T * 2 * b * g)
    if s.attention == "full":
        kept = q * h * (c * D + 4)
    else:
        kept = q * h * (3 * c * D + 3 * 4 + 3 * c) + 2 * 4 * q * g * s.selected
        kept += 2 * c * (T // s.compress_stride) * g * D
    return float(norm + projected + worked_on + kept + c * t * s.heads * D)


def ffn_saved(job: Job) -> float:
    """What autograd keeps of a block's feed-forward.

    Norm: (4 + c)·t·C. Output (or hidden factors) that DeepEmbed scales: c·t·C (c·t·F). Experts:
    routing tables (17 bytes per token and expert), inner products c·pairs·I with 8 bytes per pair.
    Dense: c·t·(I + F).
    """
    s, c, t = job.shape, COMPUTE, job.shard
    out = (4 + c) * t * s.width
    if s.deepembed != "off":
        out += c * t * (s.width if s.deepembed == "output" else s.hidden)
    if s.ffn == "dense":
        return float(out + c * t * (job.inner + s.hidden))
    out += 17 * t * s.experts + job.pairs * (c * job.inner + 8)
    if s.shared_hidden:
        out += c * t * s.shared_hidden * (3 if s.gated else 2)
    return float(out)


def pair_buffers(job: Job) -> float:
    """Transient rows of the expert layer's backward: x, upstream and dx (C), dh and h (F), inner.

    0 for a dense layer, whose products write to what is counted as saved.
    """
    s = job.shape
    if s.ffn == "dense":
        return 0.0
    weights = s.matrices * s.width * s.hidden * s.experts
    rows = job.pairs * (3 * s.width + 2 * s.hidden + job.inner)
    return float(COMPUTE * (rows + weights))


def attention_buffers(job: Job) -> float:
    """Transient tensors of attention's backward.

    Gradients of q and of the output, c·2q·h·D, and of keys and values: c·2T·g·D a branch (full:
    twice that). NSA beside them: partial gradients c·D of at most `PARTIAL_ROWS` (query, slot,
    head); sums of keys' and values' in fp32, 8·T·g·D, and pieces of them, 8·l'·D each, one per
    `PIECE` entries of the chunk's lists and one per block and group; what the gates and
    log-sum-exps give, (24 + 3c)·q·h; compressed keys' by head in fp32, 8·(T/d)·h·D. Beyond G the
    queries' own rows, before they are padded. The forward's scores, 8·g·J of `SCORED` queries
    (J = T/l'), are held at another moment.
    """
    s, c, D = job.shape, COMPUTE, job.shape.head_dim
    q, T, h, g = job.queries, job.tokens, job.heads, job.kv_groups
    if s.attention == "full":
        return float(c * D * (2 * q * h + T * 4 * g))
    blocks = T // s.select_block
    slots = min(q * h * s.selected, PARTIAL_ROWS)
    pieces = slots * g // h // PIECE + 1 + g * blocks
    backward = c * D * (2 * q * h + 6 * T * g + slots) + 8 * D * (T * g + pieces * s.select_block)
    backward += (24 + 3 * c) * q * h + 8 * D * h * (T // s.compress_stride)
    if job.column > 1:
        backward += c * D * (T // job.column) * h
    overlap = 2 if s.compress_block > s.compress_stride else 1
    forward = 4 * overlap * min(q, SCORED) * g * blocks + slots * (c * D + 4)
    return float(max(backward, forward))


def logits(job: Job) -> float:
    """The head's chunk of logits, the gradient of its input, and its weight's in fp32."""
    s, t = job.shape, job.shard
    chunk = 1 << math.ceil(math.log2(max(t / math.ceil(s.vocab / s.width), 1)))
    return float(
        2 * COMPUTE * min(chunk, t) * s.vocab + COMPUTE * t * s.width + 4 * s.vocab * s.width
    )


def activations(job: Job) -> dict[str, float]:
    """What a pass adds at its fullest moment.

    Kept: every block's saved tensors, or with activation checkpoints its input (c·t·C; two of them
    when they are offloaded). Then the fuller of two moments: a block's backward (with checkpoints
    all its saved tensors, too), or the head. DeepEmbed rows: 2c·U·L·W (values and gradients).
    """
    s = job.shape
    kind = checkpointing_of(job.cfg.model.activation_checkpointing)
    inputs = float(COMPUTE * job.shard * s.width)
    block = {"attention, saved": attention_saved(job), "feed-forward, saved": ffn_saved(job)}
    blocks = {"none": s.layers, "recompute": 1, "offload": 1}[kind]
    kept = {"none": s.layers, "recompute": s.layers, "offload": 2}[kind] * inputs
    row = 2 * COMPUTE * job.unique_ids * job.row_width
    buffers = {"pair buffers": pair_buffers(job), "attention buffers": attention_buffers(job)}
    backward = max(buffers.values()) + (blocks * sum(block.values()))
    head = logits(job) + (blocks * sum(block.values()) if kind == "none" else 0.0)
    out = {"block inputs": kept, "table rows": float(row)}
    if head > backward:
        return out | {"logits": logits(job)} | ({k: blocks * v for k, v in block.items()}
                                                if kind == "none" else {})  # fmt: skip
    fuller = max(buffers, key=lambda k: buffers[k])
    return out | {k: blocks * v for k, v in block.items()} | {fuller: buffers[fuller]}


def gpu_memory(job: Job) -> dict[str, float]:
    """Bytes of a GPU by component at its fullest moment: within a pass, or in the optimizer."""
    held, passing = states(job), activations(job)
    if job.cfg.engine.offload.optimizer != "none":
        return held | passing
    zero = job.cfg.engine.zero
    # Where weights stay, the optimizer works on the sums themselves.
    stepping = 0.0 if job.resident else 4.0 * min(job.partition, zero.sub_group_size)
    if stepping > sum(passing.values()):
        return held | {"optimizer's gradients": stepping}
    return held | passing


def host_memory(job: Job) -> dict[str, float]:
    """Bytes of a node's memory by component.

    optimizer: 12·n/W per rank when offloaded to cpu, and 4·n/W of gradients when offloaded at all.
    weights: c·n/W. table: V/W rows of all fields in fp32 (host tier), or its cache (nvme).
    activations: L - 2 block inputs, and what DeepEmbed scales of L - 1 blocks (keep_output).
    checkpoint: one copy of the states that is being written, with the rows of a table on the
    device; of a table elsewhere at most a quarter of the rows in host memory, those that change
    before they are read.
    """
    offload, part = job.cfg.engine.offload, job.partition
    kind = checkpointing_of(job.cfg.model.activation_checkpointing)
    de = job.cfg.model.deepembed
    rows = math.ceil(job.shape.vocab / job.world)
    table = 4.0 * rows * job.table_columns
    cached = de.cache_rows / max(rows, 1) if de.cache_rows else 0.25
    layers, rows_C = job.shape.layers, COMPUTE * job.shard * job.shape.width
    away = max(layers - 2, 0) * rows_C
    # As TinyOnn decides it.
    scaled = de.keep_output and de.kind == "output" and de.partition == "rows"
    scaled = scaled and kind != "none" and job.shape.ffn == "dense"
    copied = {"host": COPIES_SHARE, "nvme": COPIES_SHARE, "device": 1.0}[de.tier]
    rank = {
        "optimizer": 12.0 * part if offload.optimizer == "cpu" else 0.0,
        "gradients": 4.0 * part if offload.optimizer != "none" else 0.0,
        "weights": COMPUTE * part if offload.params == "cpu" else 0.0,
        "table": {"host": 1.0, "nvme": min(cached, 1.0), "device": 0.0}[de.tier] * table,
        "block inputs": float(away) if kind == "offload" else 0.0,
        "DeepEmbed's inputs": float((layers - 1) * rows_C) if scaled else 0.0,
        "checkpoint": 12.0 * part + copied * table,
        "processes": float(PROCESS_BYTES),
    }
    return {name: job.per_node * value for name, value in rank.items()}


def disk_bytes(job: Job) -> dict[str, float]:
    """Bytes on a node's local disk by component (NVMe offload and the nvme tier of tables)."""
    offload, part = job.cfg.engine.offload, job.partition
    rows = math.ceil(job.shape.vocab / job.world)
    rank = {
        "optimizer": 12.0 * part if offload.optimizer == "nvme" else 0.0,
        "weights": COMPUTE * part if offload.params == "nvme" else 0.0,
        "table": 4.0 * rows * job.table_columns * (job.cfg.model.deepembed.tier == "nvme"),
    }
    return {name: job.per_node * value for name, value in rank.items()}
