"""`tiny-onn preflight`: is this node fit to train on? One process per node, before the ranks start.

Every node looks at itself (versions, GPUs, disks) and at the job's network (an all-reduce with
either neighbour and one over all nodes, on gloo and, with GPUs, on NCCL), and leaves
`logs/TRY-preflight-nodeN.json`. The file is written before every stage: that of a node that hung
says where. `preflight_judge` then reads all of them where the job's script runs.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data.config import node_folder
from data.stored import is_remote
from launcher import config
from launcher.config import RunConfig
from launcher.lifecycle import RunFolder, write_atomically
from launcher.path_verb import run_folder
from launcher.preflight_judge import report_path
from launcher.ranks import Rendezvous, visible_gpus

ROOMS = ("launcher", "tiny_onn", "parallel", "data", "kernels")
REPOSITORY = Path(__file__).resolve().parent.parent
GB = 1e9
PEERS_SECONDS = 150.0
"""How long a node waits for the others to come to the network check."""
LINK_SECONDS = 30.0
"""How long one all-reduce of the network check may take."""
GPU_SECONDS = 120
ELEMENTS = 1 << 20

GPU_CODE = """
import sys, torch
for i in range(int(sys.argv[1])):
    a = torch.ones(512, 512, device=f"cuda:{i}")
    total = (a @ a).sum().item()
    assert total == 512.0**3, f"GPU {i} computes {total} instead of {512.0**3}"
    free, size = torch.cuda.mem_get_info(i)
    assert free > 0.8 * size, f"GPU {i}: only {free / 1e9:.1f} of {size / 1e9:.1f} GB are free"
    print(torch.cuda.get_device_name(i))
"""


@dataclass
class Report:
    """What one node found about itself.

    Attributes:
        node: index of the node in the job.
        name: what Slurm calls it.
        doing: the stage that has begun; "" when all have ended.
        problems: what makes the node unfit, with the remedy.
        versions: of what has to be the same on all nodes.
        gpus: names of the GPUs that answered.
        peers: node -> "" when it came to the network check, else what was missing.
        links: node -> "" when the all-reduce with it worked, else how it failed.
        network: how the all-reduce over all nodes failed, "" when it worked.
        gigabytes_per_s: by backend, of the all-reduce over all nodes.
        seconds: that the check took.
    """

    node: int
    name: str
    doing: str = "start"
    problems: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    peers: dict[int, str] = field(default_factory=dict)
    links: dict[int, str] = field(default_factory=dict)
    network: str = ""
    gigabytes_per_s: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


def versions() -> dict[str, str]:
    """Return what all nodes must have alike, by name."""
    found = {
        "python": platform.python_version(),
        "cuda": str(torch.version.cuda),
        "checkout": _checkout(),
        "driver": "",
    }
    for package in ("torch", "deepspeed", "mosaicml-streaming", "numpy", "safetensors", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)
        found["driver"] = " ".join(sorted(set(done.stdout.split())))
    return found


def _checkout() -> str:
    content = hashlib.sha256()
    for room in ROOMS:
        for path in sorted((REPOSITORY / room).rglob("*.py")):
            content.update(path.read_bytes())
    return content.hexdigest()[:12]


def asked_gpus(cfg: RunConfig) -> int:
    """Return how many GPUs this node's ranks are to have: what Slurm gave, or what is visible."""
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    count = int(given) if given.isdigit() else visible_gpus()
    return min(count, cfg.launch.processes) if cfg.launch.processes else count


def check_gpus(count: int) -> tuple[list[str], list[str]]:
    """Let every GPU multiply; returns (names of those that answered, problems).

    In a process of its own: a GPU that has fallen off the bus can hold a process for good.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", GPU_CODE, str(count)],
            capture_output=True,
            text=True,
            check=False,
            timeout=GPU_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return [], [f"{count} GPU(s) were asked for and do not answer within {GPU_SECONDS} s"]
    names = done.stdout.splitlines()
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return names, [f"{count} GPU(s) were asked for, GPU {len(names)} does not answer: {last}"]
    return names, []


def scratch_folders(cfg: RunConfig) -> list[Path]:
    """Return the node-local folders that the configuration uses."""
    folders = []
    if cfg.data.stage or is_remote(cfg.data.path):
        folders.append(node_folder(cfg.data.cache))
    if cfg.engine.offload.uses_nvme:
        folders.append(Path(cfg.engine.offload.nvme_path))
    if cfg.model.row_parts and cfg.model.deepembed.tier == "nvme":
        folders.append(Path(cfg.model.deepembed.nvme_path))
    return folders


def check_folder(folder: Path, needed_gb: float) -> list[str]:
    """Write, read back and remove a file, and look at the free space; returns problems."""
    probe = folder / f".preflight-{os.environ.get('NODE_RANK', '0')}-{os.getpid()}"
    content = os.urandom(1 << 20)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())
            if probe.read_bytes() != content:
                return [f"{folder}: what is read is not what was written"]
        finally:
            probe.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free / GB
    except OSError as e:
        return [f"{folder} cannot be written: {e.strerror}"]
    if free < needed_gb:
        return [
            f"{folder} has {free:.2f} GB free, {needed_gb:.2f} are needed (launch.free_gb is the "
            "least)"
        ]
    return []


def newest_checkpoint_gb(folder: RunFolder) -> float:
    """Return the size of the run's newest committed checkpoint, 0 without one."""
    committed = sorted(folder.checkpoints.glob("step-*/COMMITTED"))
    if not committed:
        return 0.0
    return sum(p.stat().st_size for p in committed[-1].parent.rglob("*") if p.is_file()) / GB


def _all_reduce(store: Any, name: str, rank: int, world: int, backend: str) -> float:
    """All-reduce `ELEMENTS` floats over a group of its own; returns GB/s, raises what fails."""
    c10d: Any = dist
    prefixed, patience = c10d.PrefixStore(name, store), timedelta(seconds=LINK_SECONDS)
    if backend == "nccl":
        group, device = c10d.ProcessGroupNCCL(prefixed, rank, world, patience), "cuda"
    else:
        group, device = c10d.ProcessGroupGloo(prefixed, rank, world, patience), "cpu"
    values = torch.full((ELEMENTS,), float(rank + 1), device=device)
    group.allreduce([values]).wait()
    expected = world * (world + 1) / 2
    if values.min().item() != expected or values.max().item() != expected:
        raise RuntimeError(f"the sum is {values.min().item()}, not {expected}")
    start = time.perf_counter()
    for _ in range(3):
        group.allreduce([values]).wait()
    values[0].item()
    return 3 * 4 * ELEMENTS / GB / (time.perf_counter() - start)


def check_network(place: Rendezvous, report: Report, backends: Sequence[str]) -> None:
    """Meet the other nodes and all-reduce with two neighbours and with all; fills the report."""
    c10d: Any = dist
    try:
        store = c10d.TCPStore(
            place.address,
            place.port,
            is_master=place.node == 0,
            wait_for_workers=False,
            timeout=timedelta(seconds=PEERS_SECONDS),
        )
    except dist.DistError as e:
        report.network = f"cannot reach node 0 at {place.address} port {place.port}: {_first(e)}"
        report.peers[0] = report.network
        return
    store.set(f"here/{place.node}", "1")
    missing = _missing(store, place.nodes)
    for node in range(place.nodes):
        report.peers[node] = "did not come to the network check" if node in missing else ""
    # Even with one missing: what the others can do with each other tells whose fault it is.
    for round_ in (0, 1):
        for backend in backends:
            pair = _pair(place.node, place.nodes, round_)
            if pair is None or missing & set(pair):
                continue
            peer = pair[0] + pair[1] - place.node
            name = f"{backend}/{pair[0]}-{pair[1]}"
            try:
                _all_reduce(store, name, int(place.node == pair[1]), 2, backend)
                report.links.setdefault(peer, "")
            except (RuntimeError, ValueError) as e:
                report.links[peer] = f"{backend}: {_first(e)}"
    if not missing:
        for backend in backends:
            try:
                speed = _all_reduce(store, f"{backend}/all", place.node, place.nodes, backend)
                report.gigabytes_per_s[backend] = round(speed, 3)
            except (RuntimeError, ValueError) as e:
                report.network = f"{backend}: {_first(e)}"
    # The store lives in node 0's process: it leaves last.
    store.set(f"left/{place.node}", "1")
    if place.node == 0:
        _wait_for(
            lambda: all(store.check([f"left/{n}"]) for n in range(place.nodes) if n not in missing),
            4 * LINK_SECONDS,
        )


def _pair(node: int, nodes: int, round_: int) -> tuple[int, int] | None:
    """Return the two nodes that all-reduce together in a round, lower one first; None for none."""
    # Round 0: 0-1, 2-3 …; round 1: 1-2, 3-4 … and, for an even number, the last with the first.
    first = node - (node + round_) % 2
    other = first + 1
    if first < 0 or other >= nodes:
        if round_ == 0 or nodes % 2 or nodes == 2:
            return None
        return 0, nodes - 1
    return first, other


def _missing(store: Any, nodes: int) -> set[int]:
    left = set(range(nodes))

    def all_came() -> bool:
        left.difference_update([n for n in left if store.check([f"here/{n}"])])
        return not left

    _wait_for(all_came, PEERS_SECONDS)
    return left


def _wait_for(reached: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        # Before the look: this process may be held up between the two.
        over = time.monotonic() >= deadline
        if reached() or over:
            return
        time.sleep(0.1)


def _first(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0]


def probe(cfg: RunConfig, folder: RunFolder, report: Report, path: Path) -> None:
    """Run every stage on this node; the report is on the disk before each of them."""

    def stage(name: str) -> None:
        report.doing = name
        write_atomically(path, json.dumps(asdict(report)))
        print(f"node {report.node} ({report.name}): {name or 'checked'}", flush=True)

    start = time.monotonic()
    stage("versions")
    report.versions = versions()
    stage("disks")
    needed = cfg.launch.free_gb
    report.problems += check_folder(folder.root, needed + newest_checkpoint_gb(folder))
    for scratch in scratch_folders(cfg):
        report.problems += check_folder(scratch, needed)
    backends = ["gloo"]
    count = asked_gpus(cfg)
    if count:
        stage(f"{count} GPU(s)")
        report.gpus, problems = check_gpus(count)
        report.problems += problems
        if not problems:
            backends.append("nccl")
    place = Rendezvous.from_environment(os.environ)
    if place.nodes > 1:
        stage("network")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", place.interface())
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
        check_network(place, report, backends)
    report.seconds = round(time.monotonic() - start, 1)
    stage("")


def main(argv: Sequence[str]) -> int:
    """Check this node; does not return."""
    p = argparse.ArgumentParser(
        prog="tiny-onn preflight",
        description="Check this node of a Slurm job before its ranks start.",
        epilog="example: srun --ntasks-per-node=1 tiny-onn preflight launcher/configs/1b.yaml",
    )
    p.add_argument("config", type=Path)
    known, overrides = p.parse_known_args(argv)
    cfg = config.load(known.config, overrides)
    folder = RunFolder(run_folder(known.config, overrides)).create()
    os.environ.update({k: str(v) for k, v in cfg.launch.environment.items()})
    node = int(os.environ.get("NODE_RANK", "0"))
    report = Report(node, os.environ.get("NODE_NAME", platform.node()))
    probe(cfg, folder, report, report_path(folder.logs, folder.attempt, node))
    # A collective that timed out leaves threads that would keep the process.
    sys.stdout.flush()
    os._exit(0)
