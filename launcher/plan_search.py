"""What keeps a planned job from fitting, what would make it fit, and how good plans are."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from launcher.config import RunConfig, load
from launcher.flops import peak_flops
from launcher.plan_job import GIB, Job, Machine
from launcher.plan_memory import gpu_memory, host_memory
from launcher.plan_time import step_seconds
from parallel.group_exchange import working_degrees

Change = tuple[str, Any]
"""A dotted key, or `nodes`, and its new value."""


def problems(job: Job) -> list[str]:
    """Say what does not fit, with the largest parts of it; empty when everything does."""
    out = []
    for what, parts, limit in (
        ("GPU", gpu_memory(job), job.machine.gpu_gib * (1 - job.machine.reserve)),
        ("host", host_memory(job), job.machine.host_gib * 0.95),
    ):
        total = sum(parts.values()) / GIB
        if total > limit:
            largest = sorted(parts, key=lambda k: -parts[k])[:3]
            names = ", ".join(f"{k} {parts[k] / GIB:.1f}" for k in largest)
            out.append(f"{what} memory: {total:.1f} GiB of {limit:.1f} usable; most: {names}")
    return out


def with_batch(cfg: RunConfig, world: int) -> RunConfig:
    """Return the configuration, its batch raised to what `world` ranks share if need be."""
    per_pass = cfg.train.micro_batch * max(world // cfg.mesh.group, 1)
    batch = -(-cfg.train.global_batch // per_pass) * per_pass
    return replace(cfg, train=replace(cfg.train, global_batch=batch))


def changed(job: Job, changes: tuple[Change, ...]) -> Job:
    """Return the job with other values."""
    cfg, nodes = copy.deepcopy(job.cfg), job.nodes
    for key, value in changes:
        if key == "nodes":
            nodes = value
            continue
        *path, last = key.split(".")
        part: Any = cfg
        for name in path:
            part = getattr(part, name)
        setattr(part, last, value)
    cfg = with_batch(cfg, nodes * job.per_node)
    return Job(cfg, nodes, job.per_node, job.machine)


def _single_changes(job: Job) -> Iterator[Change]:
    cfg = job.cfg
    order = ("none", "recompute", "offload")
    at = order.index(str(cfg.model.activation_checkpointing))
    for kind in order[at + 1 :]:
        yield "model.activation_checkpointing", kind
    if cfg.train.micro_batch > 1:
        yield "train.micro_batch", 1
    if job.resident and job.world > 1:
        yield "engine.zero.resident_gib", 0.0
    for degree in working_degrees(job.shape.groups, job.world):
        if degree > job.group and not (degree % job.per_node and job.per_node % degree):
            yield "mesh.group", degree
    for key in ("optimizer", "params"):
        if getattr(cfg.engine.offload, key) == "none":
            yield f"engine.offload.{key}", "cpu"
    if job.table_columns:
        tiers = ("device", "host", "nvme")
        for tier in tiers[tiers.index(cfg.model.deepembed.tier) + 1 :]:
            yield "model.deepembed.tier", tier
    for factor in (2, 4, 8):
        yield "nodes", job.nodes * factor


def remedies(job: Job, most: int = 3) -> list[tuple[tuple[Change, ...], float]]:
    """Find changes after which the job fits: the fewest, and of those the fastest.

    Returns:
        Up to `most` of (changes, GPU time per token relative to the first).
    """
    singles = list(_single_changes(job))
    for count in (1, 2, 3):
        found = []
        for changes in combinations(singles, count):
            if len({key for key, _ in changes}) < count:
                continue
            trial = changed(job, changes)
            try:
                if trial.micro_batches and not problems(trial):
                    found.append((changes, gpu_seconds(trial)))
            except ValueError:
                continue
        if found:
            found.sort(key=lambda pair: pair[1])
            return [(changes, cost / found[0][1]) for changes, cost in found[:most]]
    return []


def gpu_seconds(job: Job) -> float:
    """GPU seconds that a token costs."""
    tokens = job.cfg.train.global_batch * job.cfg.data.seq_len
    return sum(step_seconds(job).values()) * job.world / tokens


@dataclass(frozen=True)
class Point:
    """A measured run beside its prediction.

    Attributes:
        name: of the run in its file.
        job: what was run.
        gib: measured peak of a GPU.
        predicted_gib: the plan's.
        seconds: measured seconds of a step.
        predicted_seconds: the plan's, without correction.
        correction: factor on the plan's compute that makes the two equal.
    """

    name: str
    job: Job
    gib: float
    predicted_gib: float
    seconds: float
    predicted_seconds: float
    correction: float


def measured_points(results: Mapping[str, Any], machine: Machine) -> list[Point]:
    """Read what `tiny-onn bench train|scaling --json` wrote; runs on a CPU or failed are left out.

    Raises:
        ValueError: no run of a GPU with its configuration is in it.
    """
    points = []
    for name, found in results.items():
        if not isinstance(found, dict) or not {"config", "tokens_per_s"} <= found.keys():
            continue
        peak = peak_flops(str(found["device"]))
        if peak is None:
            continue
        job = Job(
            config_from(found["config"]), 1, found["ranks"], replace(machine, peak_flops=peak)
        )
        parts = step_seconds(job)
        tokens = job.cfg.train.global_batch * job.cfg.data.seq_len
        seconds = tokens / found["tokens_per_s"]
        rest = sum(parts.values()) - parts["compute"]
        correction = max(seconds - rest, 0.0) / parts["compute"]
        gib = sum(gpu_memory(job).values()) / GIB
        points.append(
            Point(
                name, job, found["memory_gib"], gib, seconds, sum(parts.values()), correction
            )
        )  # fmt: skip
    if not points:
        raise ValueError(
            "the measured file holds no run on a GPU with its configuration: write it with "
            "`tiny-onn bench train CONFIG --json FILE` or `tiny-onn bench scaling … --json FILE`"
        )
    return points


def correction_for(job: Job, points: list[Point]) -> Point | None:
    """Return the measured run most like the job: kinds, one or several ranks, tokens; or None."""
    kinds = (job.shape.attention, job.shape.ffn)
    alike = [p for p in points if (p.job.shape.attention, p.job.shape.ffn) == kinds]
    if not alike:
        return None

    def unlike(p: Point) -> tuple[bool, float]:
        return (p.job.world > 1) != (job.world > 1), abs(p.job.shard - job.shard)

    return min(alike, key=unlike)


def config_from(flat: Mapping[str, Any]) -> RunConfig:
    """Build a configuration from dotted keys and their values."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        node = tree
        for name in path:
            node = node.setdefault(name, {})
        node[last] = value
    with tempfile.TemporaryDirectory() as folder:
        path_ = Path(folder) / "measured.yaml"
        path_.write_text(yaml.safe_dump(tree))
        return load(path_)
