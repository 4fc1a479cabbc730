"""What a planned job moves between GPUs in a step, and how long the step takes.

Stated assumptions: collectives reach the machine's NVLink and network rates, go round in a ring and
pay its hops; ZeRO-3's gathers and reductions (one of each kind per block and pass) hide behind
compute up to one block's share; the exchanges around attention do not; the
tables' rows come ahead of time, their gradients and host-side steps hide behind the dense step.
Letters as in `plan_job`.
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.flops import flops_per_token
from launcher.plan_job import Job
from launcher.plan_memory import COMPUTE
from tiny_onn.activations import checkpointing_of


@dataclass(frozen=True)
class Flow:
    """Bytes that one GPU receives in a step for one purpose, by link."""

    nvlink: float
    network: float

    @property
    def total(self) -> float:
        """Bytes over both links."""
        return self.nvlink + self.network


def ring(job: Job, volume: float) -> Flow:
    """An all-gather or reduce-scatter of `volume` bytes over all ranks, as a GPU sees it.

    A GPU receives volume·(W - 1)/W in all. Its node must receive volume·(N - 1)/N from other nodes,
    which its M GPUs share; the rest comes over NVLink.
    """
    total = volume * (job.world - 1) / job.world
    network = volume * (job.nodes - 1) / job.nodes / job.per_node
    return Flow(total - network, network)


def within(job: Job, ranks: int, received: float) -> Flow:
    """`received` bytes from `ranks` neighbours alike, of which those on other nodes by network."""
    outside = max(ranks - job.per_node, 0) / max(ranks - 1, 1) if ranks > 1 else 0.0
    return Flow(received * (1 - outside), received * outside)


def communication(job: Job) -> dict[str, Flow]:
    """Bytes that a GPU receives in a step, by purpose.

    zero: per pass two gathers of c·n (forward, backward; one per step where weights stay) and a
    reduction of 4·n (reduce_dtype fp32; 2·n for bf16). exchange: per block and pass
    c·t·((H + 2bG)·D + 3H)·(R - 1)/R there and c·t·H·D·(R - 1)/R back, the same in the backward,
    once more with activation checkpoints; beyond
    G, keys and values of the other rows, c·T·2bg·D·(m - 1)/m, too. tables: c·U·L·W there, the same
    back, from all ranks alike. Counts and norms are left out.
    """
    s, c, passes = job.shape, COMPUTE, job.micro_batches
    reduced = {"fp32": 4, "bf16": 2}[job.cfg.engine.zero.reduce_dtype]
    gathers = 1.0 if job.resident else 2.0 * passes
    gather, reduce = ring(job, c * job.parameters), ring(job, reduced * job.parameters)
    out = {
        "zero gathers": Flow(gathers * gather.nvlink, gathers * gather.network),
        "zero reductions": Flow(passes * reduce.nvlink, passes * reduce.network),
    }
    if job.group > 1:
        b, D = s.kv_branches, s.head_dim
        there = (s.heads + 2 * b * s.groups) * D + (3 * s.heads if s.attention == "nsa" else 0)
        away = (job.row - 1) / job.row
        rows = job.tokens * 2 * b * job.kv_groups * D * (job.column - 1) / job.column
        once = c * (job.shard * (there + s.heads * D) * away + rows)
        ways = 2 if checkpointing_of(job.cfg.model.activation_checkpointing) == "none" else 3
        out["group exchange"] = within(job, job.group, ways * once * s.layers * passes)
    if job.table_columns:
        width = 4 if job.cfg.model.deepembed.transport == "fp32" else c
        rows = 2.0 * width * job.unique_ids * job.cfg.model.row_width * passes
        out["table rows"] = within(job, job.world, rows * (job.world - 1) / job.world)
    return out


def attention_load(job: Job) -> dict[str, float]:
    """Work of the busiest rank's attention over the mean rank's, by component; 1 up to P = G.

    Beyond G a row of ranks has the queries [a, b) of a sequence of S tokens. Full attention sees
    b² - a² pairs, at most (2m - 1)/m of the mean. NSA works through [0, b) whatever a is
    (`Job.queries`): b² in the branch and scores of compressed blocks, b in the others and in
    compression, all m times the mean in the last row of one sequence.
    """
    pairs = job.tokens * job.cfg.data.seq_len / job.column
    causal = max(sum(b * b - a * a for a, b in row) for row in job.spans) / pairs
    square = max(sum(b * b for _, b in row) for row in job.spans) / pairs
    linear = max(sum(b for _, b in row) for row in job.spans) * job.column / job.tokens
    nsa = {"attention_compressed": square, "attention_scoring": square}
    nsa |= dict.fromkeys(("attention_selected", "attention_window", "compression"), linear)
    return {"attention_full": causal, **nsa}


def compute_seconds(job: Job) -> dict[str, float]:
    """Seconds of arithmetic of the busiest GPU in a step, by component of `launcher.flops`.

    FLOPs over (peak · efficiency), times `attention_load`; activation checkpoints repeat the
    forward third of all but the head.
    """
    s, machine = job.shape, job.machine
    tokens = job.cfg.train.global_batch * job.cfg.data.seq_len / job.world
    again = checkpointing_of(job.cfg.model.activation_checkpointing) != "none"
    load = attention_load(job)
    out = {}
    for name, flops in flops_per_token(s).items():
        # Scoring has no backward; the head is no part of a block.
        repeated = {"head": 1.0, "attention_scoring": 2.0}.get(name, 4 / 3)
        times = (repeated if again else 1.0) * load.get(name, 1.0)
        out[name] = times * flops * tokens / machine.peak_flops / machine.efficiency[name]
    return out


def optimizer_seconds(job: Job) -> float:
    """Seconds of the optimizer: 30 bytes per owned parameter through HBM, or host memory and PCIe.

    On the host: 28 bytes through a node's memory, which its ranks share, then c bytes back to the
    GPU; gradients come down during the backward.
    """
    machine, part = job.machine, job.partition
    if job.cfg.engine.offload.optimizer == "none":
        return 30.0 * part / machine.hbm
    return 28.0 * part * job.per_node / machine.host_memory + COMPUTE * part / machine.pcie


def flow_seconds(job: Job, flow: Flow) -> float:
    """Seconds of a flow: the two links work beside each other."""
    return max(flow.nvlink / job.machine.nvlink, flow.network / job.machine.network)


def launch_seconds(job: Job) -> float:
    """Seconds that the host needs to launch a step: per block and pass, by its kinds."""
    machine = job.machine
    block = machine.block_seconds + machine.gathered_seconds * (not job.resident)
    block += machine.eager_seconds * (not job.cfg.model.compile_blocks)
    block += machine.nsa_seconds * (job.shape.attention == "nsa")
    block += machine.dynmoe_seconds * (job.shape.ffn == "dynmoe")
    return block * job.shape.layers * job.micro_batches


def ring_latency(job: Job) -> float:
    """Seconds of ZeRO-3's hops in a step: 3 collectives per block and pass, N - 1 hops each."""
    hops = (job.nodes - 1) + 0.1 * (job.world - job.nodes)
    return 3 * (job.shape.layers + 1) * job.micro_batches * hops * job.machine.hop


def step_seconds(job: Job, correction: float = 1.0) -> dict[str, float]:
    """Seconds of a step by part; their sum is the step.

    Args:
        job: the job.
        correction: measured over predicted time of compute, from a benchmark.
    """
    flows = communication(job)
    kernels = sum(compute_seconds(job).values())
    launching = launch_seconds(job)
    compute = max(kernels, launching) * correction
    zero = flow_seconds(job, flows["zero gathers"]) + flow_seconds(job, flows["zero reductions"])
    zero += ring_latency(job)
    exposed = max(zero - compute, zero / job.shape.layers)
    hidden = compute + exposed
    out = {
        "compute": compute,
        "zero, exposed": exposed,
        "group exchange": flow_seconds(job, flows.get("group exchange", Flow(0, 0))),
        "optimizer": optimizer_seconds(job),
    }
    if "table rows" in flows:
        moved = flow_seconds(job, flows["table rows"])
        out["tables, exposed"] = max(moved - hidden, 0.1 * moved)
    return out
