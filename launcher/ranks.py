"""Start this node's ranks, watch them, and leave none behind.

One launcher per node starts one process per rank with torchrun's environment. It is not torchrun:
that one restarts ranks by itself (here Slurm and the resume do that), waits at its own rendezvous,
dies on SIGUSR1, pins OpenMP to one thread and takes seconds to notice a death.

What holds: a dead rank ends the others within a second and is named with its log's tail; SIGUSR1,
SIGTERM and SIGINT reach every rank; a launcher that is killed takes its ranks along.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType

import psutil

from launcher.beats import VARIABLE, BeatBoard
from launcher.hang_watch import HangWatch
from launcher.lifecycle import LaunchConfig, RunError, RunFolder, RunLock
from launcher.watchdog import EXIT_HUNG

POLL_SECONDS = 0.05
TAIL_LINES = 25
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)


class PortTakenError(RunError):
    """The rendezvous' port is in use: another one, or another moment, may do."""


class UnresolvedError(RunError):
    """The name of a node does not resolve now: another moment may do."""


@dataclass(frozen=True)
class Rendezvous:
    """How the nodes of a job find each other.

    Attributes:
        nodes: launchers in the job, one per node.
        node: index of this one.
        address: host of node 0, where rank 0 serves the store.
        port: port of the store; 0 until `held` has one from the kernel.
        peers: host names of all nodes, in order; empty when not known.
    """

    nodes: int
    node: int
    address: str
    port: int
    peers: tuple[str, ...] = ()

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Rendezvous:
        """Read NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT; without NNODES this node is alone.

        Raises:
            RunError: a part is missing or cannot work. Several nodes never meet at localhost.
        """
        text = environment.get("NNODES", "1")
        if text == "1":
            # A port the kernel picks (see `held`): two runs on one machine never meet.
            return cls(1, 0, "127.0.0.1", 0)
        names = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [n for n in names if not environment.get(n)]
        if missing:
            raise RunError(
                f"NNODES is {text}, but the environment lacks {', '.join(missing)}; "
                "slurm/pretrain.sh sets them from the job's node list"
            )
        for name in ("NNODES", "NODE_RANK", "MASTER_PORT"):
            if not environment[name].isdigit():
                raise RunError(f"{name}={environment[name]!r} is not a number")
        nodes, node = int(text), int(environment["NODE_RANK"])
        if not 0 <= node < nodes:
            raise RunError(f"NODE_RANK {node} is not below NNODES {nodes}")
        address = environment["MASTER_ADDR"]
        if address in ("localhost", "::1") or address.startswith("127."):
            raise RunError(
                f"MASTER_ADDR is {address}, which every one of the {nodes} nodes takes for itself; "
                "set it to a name or address of node 0 that the others can reach"
            )
        peers = tuple(environment.get("TINY_ONN_NODES", "").split())
        return cls(nodes, node, address, int(environment["MASTER_PORT"]), peers)

    def interface(self) -> str:
        """Name the network interface over which this node reaches the others.

        Gloo would otherwise announce whatever this host's own name resolves to, which on many
        machines is a loopback address that no peer can reach.

        Raises:
            UnresolvedError: the others' address does not resolve.
            RunError: it resolves to this machine's loopback.
        """
        if self.nodes == 1:
            return "lo"
        others = [p for i, p in enumerate(self.peers) if i != self.node] or [self.address]
        try:
            family, kind, _, _, place = socket.getaddrinfo(
                others[0], self.port, type=socket.SOCK_DGRAM
            )[0]
        except socket.gaierror as e:
            raise UnresolvedError(
                f"node {self.node} cannot resolve node name {others[0]}: {e.strerror}"
            ) from None
        with socket.socket(family, kind) as s:
            s.connect(place)
            own = str(s.getsockname()[0])
        for name, addresses in psutil.net_if_addrs().items():
            if any(a.address.partition("%")[0] == own for a in addresses) and name != "lo":
                return str(name)
        raise RunError(
            f"node {self.node} reaches {others[0]} only as {own}, which is not on a network "
            "interface; give the nodes names that resolve to their network addresses"
        )

    @contextmanager
    def held(self) -> Iterator[Rendezvous]:
        """Keep the store's port for rank 0, which takes seconds to come, from all other programs.

        A socket that does not listen keeps a port from those that let the kernel pick one and from
        those that do not share. PyTorch's store shares (SO_REUSEADDR).

        Raises:
            PortTakenError: something else listens there; names it where that can be told.
        """
        if self.node != 0:
            yield self
            return
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((self.address if self.nodes == 1 else "", self.port))
            except OSError as e:
                raise self._taken(e) from None
            yield replace(self, port=int(s.getsockname()[1]))

    def _taken(self, error: OSError) -> PortTakenError:
        owner = ""
        with suppress(psutil.AccessDenied):
            for c in psutil.net_connections("tcp"):
                if c.laddr and c.laddr.port == self.port and c.status == "LISTEN" and c.pid:
                    owner = f" by process {c.pid} ({psutil.Process(c.pid).name()})"
        return PortTakenError(
            f"port {self.port} of {self.address} (MASTER_PORT), where the ranks are to meet, is "
            f"taken{owner} ({error.strerror}): set MASTER_PORT to a free one on all nodes, or end "
            "that process; a Slurm job looks for a free one at its next try"
        )


def visible_gpus() -> int:
    """Count the NVIDIA GPUs this process may use, without loading a GPU library."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        names = [n.strip() for n in listed.split(",")]
        # CUDA stops at the first name that is not one; Slurm writes NoDevFiles for none.
        return sum(1 for n in names if n and n not in ("-1", "NoDevFiles"))
    if shutil.which("nvidia-smi") is None:
        return 0
    found = subprocess.run(
        ["nvidia-smi", "-L"], capture_output=True, text=True, check=False, timeout=60
    )
    return sum(line.startswith("GPU ") for line in found.stdout.splitlines())


def ranks_per_node(cfg: LaunchConfig) -> int:
    """Return how many ranks a launcher starts here."""
    return cfg.processes or visible_gpus() or 2


def world_size(cfg: LaunchConfig) -> int:
    """Return the ranks of the whole job, if every node is like this one."""
    return ranks_per_node(cfg) * int(os.environ.get("NNODES", "1"))


def usable_cores() -> int:
    """Count the cores this process may use: affinity, Slurm's allocation, the container's quota."""
    cores = len(os.sched_getaffinity(0))
    if os.environ.get("SLURM_CPUS_ON_NODE", "").isdigit():
        cores = min(cores, int(os.environ["SLURM_CPUS_ON_NODE"]))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, int(limit) // int(period))
    return max(cores, 1)


@dataclass
class _Rank:
    """One rank's process and its log."""

    rank: int
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """End the rank and everything that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def ending(self) -> str:
        """Say how the process ended."""
        code = self.process.returncode
        if code >= 0:
            return f"failed with exit code {code}"
        name = signal.Signals(-code).name
        hint = " (the kernel does that when memory runs out: see dmesg)" if code == -9 else ""
        return f"was killed by {name}{hint}"

    def tail(self) -> str:
        """The last lines of the log."""
        with self.log.open("rb") as f:
            f.seek(max(0, self.log.stat().st_size - 16384))
            lines = f.read().decode(errors="replace").splitlines()[-TAIL_LINES:]
        return "\n".join(f"  | {line}" for line in lines)


@dataclass
class _Signals:
    """The requests to stop that this launcher got and has not yet passed on."""

    received: list[signal.Signals] = field(default_factory=list)
    waiting: list[signal.Signals] = field(default_factory=list)

    def install(self) -> dict[signal.Signals, Callable[..., object] | int | None]:
        """Handle the signals; returns what handled them before."""
        numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
        return {number: signal.signal(number, self._handle) for number in numbers}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number))
        self.waiting.append(signal.Signals(number))


class _Stream:
    """Copies what rank 0 appends to its log to this process's standard output."""

    def __init__(self, log: Path) -> None:
        self.file = log.open("rb")
        self.bar = None
        if sys.stdout.isatty():
            # Loads torch, which takes seconds, and only a terminal needs it here.
            from launcher.progress import TerminalBar

            self.bar = TerminalBar()

    def copy(self) -> None:
        data = self.file.read()
        if data and self.bar is not None:
            self.bar.write(data)
        elif data:
            sys.stdout.buffer.write(data)
            sys.stdout.flush()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        self.file.close()


def launch(arguments: Sequence[str], folder: RunFolder, cfg: LaunchConfig) -> int:
    """Run `python *arguments` as every rank of this node, until all have ended.

    Each process finds torchrun's variables in its environment (RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT), and TINY_ONN_TRY, which names its logs
    `logs/TRY-rankR.log`. Rank 0 is copied to the standard output. Call it from the main thread.

    Returns:
        0 when every rank ended well, also when asked to stop; 1 when one failed; 128 + the signal's
        number when a request to stop ended them before they could heed it.

    Raises:
        RunError: another launcher works in the folder, or the rendezvous cannot work.
    """
    if folder.stop.exists():
        print(f"{folder.stop} asks this run not to run; remove it to go on: rm {folder.stop}")
        return 0
    folder.create()
    processes = ranks_per_node(cfg)
    signals = _Signals()
    before = signals.install()
    ranks: list[_Rank] = []
    try:
        with ExitStack() as stack:
            place = stack.enter_context(Rendezvous.from_environment(os.environ).held())
            # Of the nodes' launchers the first one holds the folder for all.
            lock = stack.enter_context(RunLock(folder)) if place.node == 0 else None
            board = stack.enter_context(closing(BeatBoard(processes, cfg.first_step_timeout)))
            for local in range(processes):
                environment = _environment(place, local, processes, cfg, folder.attempt)
                environment[VARIABLE] = board.variable(local)
                inherited = board.descriptors(local)
                ranks.append(_start(arguments, environment, folder, inherited))
            hangs = HangWatch(ranks, board, folder, place.node, place.nodes)
            return _watch(ranks, signals, lock, place, hangs)
    except (PortTakenError, UnresolvedError):
        # The next try may do better; how many there are is the job's budget.
        raise
    except RunError as e:
        folder.refuse(str(e))
        raise
    finally:
        for rank in ranks:
            rank.kill()
            rank.process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(
    place: Rendezvous, local: int, processes: int, cfg: LaunchConfig, attempt: str
) -> dict[str, str]:
    environment = dict(os.environ)
    environment.update({name: str(value) for name, value in cfg.environment.items()})
    environment.update(
        RANK=str(place.node * processes + local),
        WORLD_SIZE=str(place.nodes * processes),
        LOCAL_RANK=str(local),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR=place.address,
        MASTER_PORT=str(place.port),
        NODE_RANK=str(place.node),
        TINY_ONN_TRY=attempt,
        PYTHONUNBUFFERED="1",
    )
    if place.node == local == 0 and sys.stdout.isatty():
        # Rank 0 writes to its log, but what is copied from there to a terminal may use one.
        environment.update(TTY_COMPATIBLE="1", COLUMNS=str(shutil.get_terminal_size().columns))
    if sys.stdout.isatty():
        environment["TINY_ONN_TERMINAL"] = "1"
    if cfg.threads:
        environment["OMP_NUM_THREADS"] = str(cfg.threads)
    # The last collectives of every rank, for the report of a hang.
    environment.setdefault("TORCH_FR_BUFFER_SIZE", "1000")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // processes)))
    environment.setdefault("GLOO_SOCKET_IFNAME", place.interface())
    return environment


def _start(
    arguments: Sequence[str],
    environment: dict[str, str],
    folder: RunFolder,
    inherited: Sequence[int],
) -> _Rank:
    rank, parent = int(environment["RANK"]), os.getpid()
    log = folder.logs / f"{folder.attempt}-rank{rank}.log"

    def follow_the_launcher_into_death() -> None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            pass_fds=inherited,
            # A group of its own: the terminal's Ctrl-C comes once, from here, and the rank's own
            # workers end with it.
            process_group=0,
            preexec_fn=follow_the_launcher_into_death,  # noqa: PLW1509 - no threads here
        )
    return _Rank(rank, process, log)


def _watch(
    ranks: Sequence[_Rank],
    signals: _Signals,
    lock: RunLock | None,
    place: Rendezvous,
    hangs: HangWatch,
) -> int:
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(_Stream(r.log))) for r in ranks if r.rank == 0]
        return _until_ended(ranks, signals, lock, place, hangs, streams)


def _until_ended(
    ranks: Sequence[_Rank],
    signals: _Signals,
    lock: RunLock | None,
    place: Rendezvous,
    hangs: HangWatch,
    streams: Sequence[_Stream],
) -> int:
    while True:
        codes = [r.process.poll() for r in ranks]
        if any(codes):
            # One that ended for a peer's sake may have been seen first: now the peer is, too.
            codes = [r.process.poll() for r in ranks]
        for stream in streams:
            stream.copy()
        failed = [r for r, code in zip(ranks, codes, strict=True) if code]
        if hangs.over() or EXIT_HUNG in codes:
            print(hangs.conclude(), file=sys.stderr, flush=True)
            return 1
        if failed:
            # A rank that a signal ended is the cause of what its peers then complain about.
            return _failure(min(failed, key=lambda r: r.process.returncode), signals, place)
        if all(code == 0 for code in codes):
            return 0
        while signals.waiting:
            _pass_on(signals.waiting.pop(0), signals, ranks)
        if lock is not None:
            lock.refresh()
        time.sleep(POLL_SECONDS)


def _pass_on(number: signal.Signals, signals: _Signals, ranks: Sequence[_Rank]) -> None:
    if signals.received.count(signal.SIGINT) > 1:
        raise KeyboardInterrupt
    again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
    text = f"{number.name}: the ranks are to save and stop after this step{again}"
    print(text, file=sys.stderr, flush=True)
    for rank in ranks:
        if rank.process.poll() is None:
            rank.process.send_signal(number)


def _failure(rank: _Rank, signals: _Signals, place: Rendezvous) -> int:
    code = rank.process.returncode
    if code < 0 and -code in signals.received:
        name = signal.Signals(-code).name
        print(f"{name} ended rank {rank.rank} before it could save", file=sys.stderr, flush=True)
        return 128 - code
    where = f" on node {place.node} ({socket.gethostname()})" if place.nodes > 1 else ""
    text = f"rank {rank.rank}{where} {rank.ending()}; its log: {rank.log}"
    # Rank 0 has been seen already.
    if rank.rank:
        text += f"\n{rank.tail()}"
    if place.nodes > 1:
        text += "\nA lost connection to a peer has its cause in the log of another rank."
    print(text, file=sys.stderr, flush=True)
    return 1
