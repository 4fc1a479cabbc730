"""The life of a run: its folder, who may work in it, and how it is asked to stop.

Everything that outlives a process is a small file in the run folder, so that a shell script, a
second node or the next job can read it:

    DONE        the run has reached its last step; nothing is left to do
    STOP        `touch` it and the run saves and ends, and does not start again until it is removed
    heartbeat   JSON: the last step that ended, when, where
    lock        JSON: the launcher that works here now
    logs/       one log per rank and try; TRY.stop asks only that try to save and end, TRY.refused
                says that trying again cannot help

Nothing here loads torch before ranks have to agree on something.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from launcher.redact import SECRET_NAME

RANK_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "NODE_RANK", "NNODES", "TINY_ONN_TRY",
)  # fmt: skip
"""What tells a rank its place; only the launcher knows it."""


class RunError(ValueError):
    """The run cannot go on as things are; the message says what was found and the remedy."""


@dataclass
class LaunchConfig:
    """How a run's processes are started and watched.

    Attributes:
        processes: ranks per node; 0 is one per GPU, or 2 on a machine without a GPU.
        threads: OpenMP threads per rank; 0 shares the node's cores among its ranks.
        step_timeout: seconds without a finished step (or validation, or save) before a rank counts
            as hung: its stacks go to logs/ and it ends; 0 waits forever.
        first_step_timeout: the same before the first step, which also loads and compiles.
        free_gb: gigabytes that the pre-flight of a Slurm job wants free in the run folder (beside a
            checkpoint) and in every node-local folder that the run uses.
        environment: variables for the ranks, as `{NCCL_SOCKET_IFNAME: ib0, NCCL_DEBUG: WARN}`. Not
            for secrets: the configuration is kept with the run.
    """

    processes: int = 0
    threads: int = 0
    step_timeout: float = 900.0
    first_step_timeout: float = 3600.0
    free_gb: float = 1.0
    environment: dict[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse negative numbers by key, and variables that do not belong into a file."""
        for key, value in asdict(self).items():
            if key != "environment" and value < 0:
                raise RunError(f"launch.{key} is {value}: expected 0 or more")
        for name in self.environment:
            if SECRET_NAME.search(name):
                raise RunError(
                    f"launch.environment has {name}: secrets are not kept with a run; export it in "
                    "the shell that starts the run (sbatch hands the environment on)"
                )
            if name in RANK_VARIABLES:
                raise RunError(f"launch.environment has {name}, which the launcher sets itself")


def write_atomically(path: Path, text: str, *, durable: bool = False) -> None:
    """Replace `path` by `text` in one step: a reader sees all of the old or all of the new.

    Args:
        path: of the file.
        text: what it holds from now on.
        durable: wait until that is so on the disk, too, and outlives the machine.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    with temporary.open("w") as f:
        f.write(text)
        if durable:
            f.flush()
            os.fsync(f.fileno())
    os.replace(temporary, path)
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


class RunFolder:
    """The paths of runs/NAME and the small files in it."""

    def __init__(self, root: Path) -> None:
        """Name the folder; `create` makes it."""
        self.root = root
        self.config = root / "config.yaml"
        self.checkpoints = root / "checkpoints"
        self.tensorboard = root / "tensorboard"
        self.logs = root / "logs"
        self.metrics = root / "metrics.jsonl"
        self.heartbeat = root / "heartbeat"
        self.lock = root / "lock"
        self.done = root / "DONE"
        self.stop = root / "STOP"
        self.skipped_data = root / "skipped_data.json"
        self.attempt = os.environ.get("TINY_ONN_TRY") or time.strftime(
            f"%Y%m%d-%H%M%S-{os.getpid()}"
        )
        self.try_stop = self.logs / f"{self.attempt}.stop"
        self.refused = self.logs / f"{self.attempt}.refused"

    def create(self) -> RunFolder:
        """Make the folder and its sub-folders; raises RunError when the disk does not let it."""
        try:
            for folder in (self.root, self.checkpoints, self.tensorboard, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise RunError(f"cannot make the run folder {self.root}: {e.strerror}") from None
        return self

    def mark_done(self, step: int) -> None:
        """Say that the run has reached its end; whoever starts it again finds that out first."""
        end = {"step": step, "time": round(time.time(), 3)}
        write_atomically(self.done, json.dumps(end) + "\n", durable=True)

    def refuse(self, message: str) -> None:
        """Leave word that trying again cannot help, so that a job is not queued again for it."""
        if self.logs.is_dir():
            write_atomically(self.refused, message + "\n")

    def beat(self, step: int, doing: str = "step") -> None:
        """Write the heartbeat: the last step that ended, what ended just now, when and where."""
        beat = {
            "step": step,
            "doing": doing,
            "time": round(time.time(), 3),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        write_atomically(self.heartbeat, json.dumps(beat) + "\n")


def process_start(pid: int) -> int | None:
    """Return when `pid` started, in clock ticks since boot; None when there is no such process.

    A pid alone names another process after some time; with its start it is unique until a reboot.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    # A zombie has ended; only its parent has not noticed.
    return None if fields[0] == "Z" else int(fields[19])


def _here() -> str:
    """Name the set of processes that this one can look up: the boot and the pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


class RunLock:
    """One launcher per run folder, across the nodes of a shared file system.

    The holder touches its file every `REFRESH` seconds (`refresh`, called by the launcher's loop).
    Whether another holder is alive is looked up in /proc when it runs beside this process, known
    when it was an earlier try of the same Slurm job, and otherwise observed: a lock that is not
    touched for `OBSERVE` seconds is that of a dead launcher. No two clocks are compared.
    """

    REFRESH = 10.0
    OBSERVE = 35.0

    def __init__(self, folder: RunFolder, say: Callable[[str], None] | None = None) -> None:
        """`say` gets a line when the lock of a dead launcher is taken over."""
        self.path = folder.lock
        self.say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        self.identity = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": process_start(os.getpid()),
            "here": _here(),
            "job": os.environ.get("SLURM_JOB_ID", ""),
            "try": os.environ.get("SLURM_RESTART_COUNT", "0"),
        }
        self._touched = 0.0

    def acquire(self) -> RunLock:
        """Take the lock, from a dead holder too; raises RunError that names a living one."""
        text = json.dumps(self.identity) + "\n"
        while True:
            try:
                with self.path.open("x") as f:
                    f.write(text)
                break
            except FileExistsError:
                holder = self._holder()
                if holder is None:
                    continue
                if self._alive(holder):
                    raise RunError(
                        f"{self.path.parent} is in use by {self._name(holder)}; wait for it, stop "
                        f"it with `touch {self.path.parent}/STOP`, or train under another --name"
                    ) from None
                self.say(f"taking over the run folder from {self._name(holder)}, which has ended")
                write_atomically(self.path, text)
                # Of two launchers that take over at once, the file names the later one.
                time.sleep(0.5)
                if self._holder() == self.identity:
                    break
        self._touched = time.monotonic()
        return self

    def refresh(self) -> None:
        """Show that the holder lives; raises RunError when someone else holds the lock by now."""
        if time.monotonic() - self._touched < self.REFRESH:
            return
        holder = self._holder()
        if holder != self.identity:
            by = "no one" if holder is None else self._name(holder)
            raise RunError(f"lost the lock {self.path} to {by}: two launchers must not share a run")
        os.utime(self.path)
        self._touched = time.monotonic()

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        if self._holder() == self.identity:
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> RunLock:
        """Acquire."""
        return self.acquire()

    def __exit__(self, *exc: object) -> None:
        """Release."""
        self.release()

    def _holder(self) -> dict[str, Any] | None:
        try:
            holder = json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except json.JSONDecodeError:
            # Just created and not yet written, or left empty by a full disk.
            holder = {}
        return holder if isinstance(holder, dict) else {}

    def _alive(self, holder: dict[str, Any]) -> bool:
        if holder.get("here") == self.identity["here"]:
            return bool(process_start(int(holder["pid"])) == holder["started"])
        if holder.get("job") and holder["job"] == self.identity["job"]:
            return False
        self.say(f"{self.path.parent} was last used by {self._name(holder)}; is it still running?")
        before = self._mark()
        deadline = time.monotonic() + self.OBSERVE
        over = False
        while not over:
            time.sleep(0.5)
            # Before the look: this process may be held up, and the lock be touched meanwhile.
            over = time.monotonic() >= deadline
            if self._mark() != before:
                return self.path.exists()
        return False

    def _mark(self) -> tuple[int, int] | None:
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return None
        return stat.st_mtime_ns, stat.st_ino

    @staticmethod
    def _name(holder: dict[str, Any]) -> str:
        if not holder:
            return "a launcher that left an unreadable lock"
        job = f", Slurm job {holder['job']}" if holder.get("job") else ""
        return f"process {holder.get('pid')} on {holder.get('host')}{job}"


class StopReason(IntEnum):
    """Why a run is to save and end now; NONE is false."""

    NONE = 0
    STOP_FILE = 1
    TRY_STOP_FILE = 2
    SIGNAL = 3
    NOT_SAVED = 4

    @property
    def text(self) -> str:
        """The reason in words."""
        return {
            StopReason.NONE: "no one asked",
            StopReason.STOP_FILE: "the run folder has a STOP file",
            StopReason.TRY_STOP_FILE: "the job is about to end (time limit or preemption)",
            StopReason.SIGNAL: "a signal asked for it",
            StopReason.NOT_SAVED: "a checkpoint could not be written",
        }[self]


class _Place(Protocol):
    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...


class StopRequest:
    """Asks every rank to stop after the same step, whoever was told first.

    SIGUSR1, SIGTERM or SIGINT to any rank, or a stop file seen by rank 0, is a request; a second
    SIGINT raises KeyboardInterrupt at once. Install it early and in the main thread: until then the
    signals end the process, which has nothing to save yet.
    """

    SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)

    def __init__(self, folder: RunFolder, mesh: _Place | None = None) -> None:
        """Install the handlers; set `mesh` before `requested` is called on more than one rank.

        `save_failed` tells whether a checkpoint that is written beside training has failed.
        """
        self.folder = folder
        self.mesh = mesh
        self.signal: signal.Signals | None = None
        self.save_failed: Callable[[], bool] = lambda: False
        self._pending: tuple[Any, Any] | None = None
        self._agreed = StopReason.NONE
        self._facts: list[float] = []
        self._heard: list[list[float]] = []
        for number in self.SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def local(self) -> StopReason:
        """What this rank alone knows."""
        if self.save_failed():
            return StopReason.NOT_SAVED
        if self.signal is not None:
            return StopReason.SIGNAL
        if self.mesh is None or self.mesh.rank == 0:
            if self.folder.stop.exists():
                return StopReason.STOP_FILE
            if self.folder.try_stop.exists():
                return StopReason.TRY_STOP_FILE
        return StopReason.NONE

    def requested(self, step: int) -> StopReason:
        """Return the reason to stop after `step`, the same on all ranks; a collective call.

        The ranks' knowledge is reduced on the host, beside the step: what is returned was known one
        call earlier, so that no rank waits for another and no device is synchronised.
        """
        if self.mesh is None or self.mesh.world == 1:
            return self.local()
        import torch
        import torch.distributed as dist

        self.finish()
        agreed, self._agreed = self._agreed, StopReason.NONE
        # Everyone's facts in places of their own: the greatest of each is the only one.
        values = torch.zeros(1 + self.mesh.world * len(self._facts), dtype=torch.float64)
        values[0] = int(self.local())
        if self._facts:
            values[1:].view(self.mesh.world, -1)[self.mesh.rank] = torch.tensor(self._facts)
        self._pending = dist.all_reduce(values, op=dist.ReduceOp.MAX, async_op=True), values
        if agreed:
            self.finish()
        return agreed

    def tell(self, facts: Sequence[float]) -> None:
        """Let `requested` also tell all ranks these numbers, not negative, equally many on each."""
        self._facts = list(facts)

    def heard(self) -> list[list[float]]:
        """Return what every rank told before the last call of `requested`, by rank; empty at first.

        Costs no wait once the ranks have met since then.
        """
        if self.mesh is None or self.mesh.world == 1:
            return [self._facts] if self._facts else []
        self.finish()
        return self._heard

    def finish(self) -> None:
        """Wait for the reduction under way; call it before the process group is destroyed."""
        if self._pending is not None:
            assert self.mesh is not None
            work, values = self._pending
            work.wait()
            self._pending = None
            self._agreed = StopReason(int(values[0]))
            self._heard = values[1:].view(self.mesh.world, -1).tolist() if len(values) > 1 else []
