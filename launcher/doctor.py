"""`tiny-onn doctor`: what this machine has, what a run would miss, and what to do about it.

Every check looks at one thing, takes milliseconds (only loading torch takes seconds) and changes
nothing. A FAIL is something no run survives; a WARN is slow, or hurts some configurations.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from launcher.lifecycle import RunFolder
from launcher.ranks import usable_cores

REPOSITORY = Path(__file__).resolve().parent.parent
ROOMS = ("launcher", "tiny_onn", "parallel", "data", "kernels")
GIB = 2**30


class Level(Enum):
    """How bad a finding is."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, what to do."""

    level: Level
    subject: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Places:
    """The folders that a run would use.

    Attributes:
        runs: folder of all runs.
        nvme: local disk for offloaded optimizer states or tables; None when not used.
        shared_memory: where POSIX shared memory lives.
    """

    runs: Path = Path("runs")
    nvme: Path | None = None
    shared_memory: Path = Path("/dev/shm")


def python(places: Places) -> Iterator[Finding]:
    """The interpreter, and the headers that compiled operators need."""
    found = f"{platform.python_version()} ({sys.executable})"
    good = (3, 11) <= sys.version_info < (3, 14)
    remedy = "" if good else "use Python 3.11 to 3.13: remove .venv, then bash slurm/env.sh"
    yield Finding(Level.OK if good else Level.FAIL, "python", found, remedy)
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        remedy = "apt-get install python3-dev"
        yield Finding(Level.WARN, "python", "no Python.h: no operator can be compiled", remedy)


def packages(places: Places) -> Iterator[Finding]:
    """The dependencies, against the versions that this checkout asks for."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    versions = []
    for requirement in map(Requirement, project["dependencies"]):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = f"{requirement} is not installed"
            yield Finding(Level.FAIL, "packages", found, "bash slurm/env.sh")
            continue
        versions.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
            found = f"{requirement.name} {version}, but {requirement.specifier} is what was tested"
            yield Finding(Level.WARN, "packages", found, "bash slurm/env.sh")
    yield Finding(Level.OK, "packages", ", ".join(versions))


def rooms(places: Places) -> Iterator[Finding]:
    """That every package of this checkout is the one that Python would import."""
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        origin = Path(spec.origin or "") if spec is not None else None
        if origin is None or REPOSITORY not in origin.resolve().parents:
            found = f"import {room} finds {origin}, not {REPOSITORY / room}"
            remedy = f"start from the checkout (cd {REPOSITORY}), or remove what is in the way"
            yield Finding(Level.FAIL, "imports", found, remedy)
    strangers = sorted(
        f"{d.name} {d.version}"
        for d in importlib.metadata.distributions()
        if re.sub("[-_.]+", "_", d.name or "").lower() in ROOMS and d.name != "tiny-onn"
    )
    if strangers:
        found = f"{', '.join(strangers)} is installed, which has the name of a folder here"
        remedy = "harmless with tiny-onn and python -m launcher; elsewhere it may win: uninstall it"
        yield Finding(Level.WARN, "imports", found, remedy)
    else:
        yield Finding(Level.OK, "imports", f"all packages come from {REPOSITORY}")


def gpus(places: Places) -> Iterator[Finding]:
    """The GPUs, the driver, and whether this build of torch can use them."""
    try:
        import torch
    except (ImportError, OSError) as e:
        yield Finding(Level.FAIL, "gpu", f"torch cannot be loaded: {e}", "bash slurm/env.sh")
        return
    devices = _nvidia_smi("name,memory.total,driver_version")
    cuda = torch.version.cuda
    build = f"torch {torch.__version__}" + (f" (CUDA {cuda})" if cuda else " (CPU build)")
    if not devices:
        yield Finding(Level.OK, "gpu", f"none: runs use the CPU; {build}")
        return
    for device in sorted(set(devices)):
        yield Finding(Level.OK, "gpu", f"{devices.count(device)} x {device}")
    if cuda is None:
        remedy = "remove .venv and run bash slurm/env.sh with an index that has CUDA builds"
        yield Finding(Level.FAIL, "gpu", f"{build} cannot use them", remedy)
    elif not torch.cuda.is_available():
        remedy = "the driver is too old for this build, or CUDA_VISIBLE_DEVICES hides the GPUs"
        yield Finding(Level.FAIL, "gpu", f"{build} sees none of them", remedy)
    else:
        yield Finding(Level.OK, "gpu", f"{build} sees {torch.cuda.device_count()}")


def compilers(places: Places) -> Iterator[Finding]:
    """What compiles DeepSpeed's and Triton's operators on first use."""
    needs = {"gcc": "gcc", "g++": "g++", "ninja": "ninja-build"}
    missing = [package for program, package in needs.items() if shutil.which(program) is None]
    if missing:
        remedy = f"apt-get install {' '.join(missing)}"
        yield Finding(Level.WARN, "compilers", f"no {', '.join(missing)}", remedy)
    else:
        yield Finding(Level.OK, "compilers", ", ".join(f"{p} {_version(p)}" for p in needs))
    if _nvidia_smi("name") and shutil.which("nvcc") is None:
        found = "no nvcc: DeepSpeed cannot compile its GPU operators"
        remedy = "load the CUDA module, or set CUDA_HOME; plain torch optimizers need none"
        yield Finding(Level.WARN, "compilers", found, remedy)


def operators(places: Places) -> Iterator[Finding]:
    """Which DeepSpeed operators are compiled already, and what stands in the way of the others."""
    cache = os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/torch_extensions")
    folder = Path(cache).expanduser()
    built = sorted({so.parent.name for so in folder.rglob("*.so")}) if folder.is_dir() else []
    found = f"compiled in {folder}: {', '.join(built) or 'none yet'}"
    yield Finding(Level.OK, "operators", found)
    includes = ("/usr/include", "/usr/local/include", *os.environ.get("CPATH", "").split(":"))
    if "async_io" not in built and not any(Path(i, "libaio.h").exists() for i in includes if i):
        level = Level.WARN if places.nvme is None else Level.FAIL
        found = "no libaio.h: NVMe offload cannot be compiled"
        yield Finding(level, "operators", found, "apt-get install libaio-dev")
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if re.search(r"\d[af]", listed):
        plain = re.sub(r"(\d)[af]", r"\1", listed)
        found = f"TORCH_CUDA_ARCH_LIST={listed}: DeepSpeed takes such a name for a number and dies"
        remedy = f"export TORCH_CUDA_ARCH_LIST='{plain}' (slurm/env.sh does)"
        yield Finding(Level.FAIL, "operators", found, remedy)


def disks(places: Places) -> Iterator[Finding]:
    """Space and permission to write where runs and offloaded states go."""
    for name, path, enough in (("runs", places.runs, 20), ("nvme", places.nvme, 100)):
        if path is None:
            continue
        folder = path.absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free / GIB
        found = f"{path}: {free:.0f} GiB free"
        if not os.access(folder, os.W_OK | os.X_OK):
            found = f"{path}: {folder} is not writable"
            yield Finding(Level.FAIL, "disk", found, f"choose another folder for {name}")
        elif free < 1:
            yield Finding(Level.FAIL, "disk", found, "free some; a full disk ends a run")
        elif free < enough:
            remedy = "enough for a demo; checkpoints take 12 bytes per parameter each"
            yield Finding(Level.WARN, "disk", found, remedy)
        else:
            yield Finding(Level.OK, "disk", found)


def shared_memory(places: Places) -> Iterator[Finding]:
    """Room for the ranks' shared memory, and what killed jobs left in it."""
    usage = shutil.disk_usage(places.shared_memory)
    found = f"{places.shared_memory}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < 64 * 2**20:
        remedy = "start the container with --shm-size=8g, or --ipc=host"
        yield Finding(Level.FAIL, "shared memory", found, remedy)
    elif usage.free < GIB:
        remedy = "start the container with --shm-size=8g: data loading shares memory"
        yield Finding(Level.WARN, "shared memory", found, remedy)
    else:
        yield Finding(Level.OK, "shared memory", found)
    stale = stale_segments(places.shared_memory)
    if stale:
        names = " ".join(str(p) for p in stale[:4]) + (" …" if len(stale) > 4 else "")
        found = f"{len(stale)} segments of data loading that no process uses: {names}"
        remedy = f"left by killed runs, harmless but for the space: rm {names}"
        yield Finding(Level.WARN, "shared memory", found, remedy)


def stale_segments(folder: Path) -> list[Path]:
    """Return this user's segments of mosaicml-streaming that no process has mapped."""
    segments = [
        p
        for p in sorted(folder.glob("[0-9][0-9][0-9][0-9][0-9][0-9]_*"))
        if p.is_file() and p.stat().st_uid == os.geteuid()
    ]
    if not segments:
        return []
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            mapped += maps.read_text()
        except OSError:
            # It has ended, or is another user's and does not use this user's segments.
            continue
    return [p for p in segments if str(p) not in mapped]


def network(places: Places) -> Iterator[Finding]:
    """That this host's name leads to it, and that a port can be opened."""
    host = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(host, None)[0][4][0])
    except socket.gaierror as e:
        found = f"host name {host} does not resolve: {e.strerror}"
        remedy = f"add it to /etc/hosts; runs over several nodes need it ({host} on every node)"
        yield Finding(Level.WARN, "network", found, remedy)
    else:
        yield Finding(Level.OK, "network", f"{host} is {address}")
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=2).close()
    except OSError as e:
        found = f"cannot connect to an own port: {e}"
        remedy = "ranks meet over TCP: allow connections to 127.0.0.1"
        yield Finding(Level.FAIL, "network", found, remedy)


def machine(places: Places) -> Iterator[Finding]:
    """Cores and memory that this process may use."""
    memory = psutil.virtual_memory()
    cores = usable_cores()
    found = f"{cores} cores, {memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB free"
    if memory.available < 3 * GIB:
        yield Finding(Level.WARN, "machine", found, "the demo needs 3 GiB; end something else")
    elif cores < 2:
        remedy = "the demo's two ranks share one core; under Slurm ask for --cpus-per-task"
        yield Finding(Level.WARN, "machine", found, remedy)
    else:
        yield Finding(Level.OK, "machine", found)


def clock(places: Places) -> Iterator[Finding]:
    """That this machine's clock agrees with the one of the file system of the runs."""
    folder = places.runs if places.runs.is_dir() else Path.cwd()
    if not os.access(folder, os.W_OK):
        return
    before = time.time()
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock") as f:
        skew = os.stat(f.name).st_mtime - before
    if abs(skew) > 5:
        found = f"{folder} is {skew:+.0f} s from this machine's clock"
        yield Finding(Level.WARN, "clock", found, "start the time service (chrony, ntpd)")
    else:
        yield Finding(Level.OK, "clock", time.strftime("%F %T %Z"))


def slurm(places: Places) -> Iterator[Finding]:
    """Whether this machine can submit jobs."""
    if shutil.which("sbatch") is None:
        yield Finding(Level.OK, "slurm", "not on this machine: runs stay on one node")
        return
    command = ["sinfo", "-h", "-o", "%P %D nodes"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3)
    except subprocess.TimeoutExpired:
        answer = "sinfo took more than 3 s"
    except subprocess.CalledProcessError as e:
        answer = str(e.stderr).strip().rpartition("\n")[2]
    else:
        yield Finding(Level.OK, "slurm", ", ".join(asked.stdout.splitlines()))
        return
    found = f"sbatch is there, but no cluster answers: {answer}"
    yield Finding(Level.WARN, "slurm", found, "sbatch works once slurm.conf names a cluster")


def running(places: Places) -> Iterator[Finding]:
    """Which runs are there, and which have gone quiet without being done."""
    for config in sorted(places.runs.glob("*/config.yaml")):
        folder = RunFolder(config.parent)
        if folder.done.exists():
            state = "done"
        elif folder.stop.exists():
            state = f"stopped by its STOP file; rm {folder.stop} to go on"
        elif folder.heartbeat.exists():
            minutes = (time.time() - folder.heartbeat.stat().st_mtime) / 60
            state = f"last heartbeat {minutes:.0f} minutes ago"
        else:
            state = "no step yet"
        yield Finding(Level.OK, "runs", f"{folder.root}: {state}")


CHECKS: tuple[Callable[[Places], Iterator[Finding]], ...] = (
    python, packages, rooms, machine, gpus, compilers, operators, disks, shared_memory, network,
    clock, slurm, running,
)  # fmt: skip


def doctor(places: Places) -> list[Finding]:
    """Run every check; returns the findings in order."""
    return [finding for check in CHECKS for finding in check(places)]


def show(findings: Sequence[Finding], console: Console) -> None:
    """Print the findings, what to do beneath what was found."""
    colours = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        level = f"[{colours[finding.level]}]{finding.level.value}[/]"
        table.add_row(level, finding.subject, escape(finding.found))
        if finding.remedy:
            table.add_row("", "", f"→ {escape(finding.remedy)}")
    console.print(table, markup=True, highlight=False)
    bad = [f for f in findings if f.level is Level.FAIL]
    warned = [f for f in findings if f.level is Level.WARN]
    console.print(f"{len(bad)} to fix, {len(warned)} to know about", highlight=False)


def _nvidia_smi(query: str) -> list[str]:
    """Return one line per GPU of this machine; empty without a driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    return done.stdout.splitlines() if done.returncode == 0 else []


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    numbers = re.findall(r"\d+(?:\.\d+)+", done.stdout.partition("\n")[0])
    return str(numbers[-1]) if numbers else "?"


def main(argv: Sequence[str]) -> int:
    """Print the report; returns 1 when something has to be fixed."""
    p = argparse.ArgumentParser(
        prog="tiny-onn doctor",
        description="Check this machine and say what to do.",
        epilog="example: tiny-onn doctor --runs /scratch/runs --nvme /local/nvme",
    )
    p.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    p.add_argument("--nvme", type=Path, help="local disk for NVMe offload")
    arguments = p.parse_args(argv)
    findings = doctor(Places(arguments.runs, arguments.nvme))
    show(findings, Console(soft_wrap=False))
    return int(any(f.level is Level.FAIL for f in findings))
