"""A real Slurm cluster on one machine, for tests: munged, slurmctld, and one slurmd per node.

Every node has its own network namespace, address, host name and /etc/hosts, so that whatever would
not find its way between two machines does not find it here either. Nothing under /etc changes, and
several clusters can be up at once: the name of a bridge device claims a subnet.

By hand: `python -m tests.slurm.cluster` keeps one up until Ctrl-C and prints how to talk to it.
Needs root and `apt-get install slurm-wlm munge iproute2`.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from launcher.lifecycle import process_start

PREFIX = "tonn"
START_SECONDS = 30.0
GPUS = 2
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None, use_errno=True)

CONFIGURATION = """\
ClusterName={name}
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
MinJobAge=3600
InactiveLimit=0
SlurmctldTimeout=10
SlurmdTimeout=15
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=10
UnkillableStepTimeout=20
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

# `-D` keeps slurmd in the foreground, and every program here replaces the one before it: the
# process that was started is slurmd.
NODE = """\
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
exec slurmd -D -N "$1"
"""


def missing() -> str:
    """Say what a cluster would need and does not have here; empty when it can be started."""
    programs = ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare")
    lacking = [p for p in programs if shutil.which(p) is None]
    if lacking:
        return f"no {', '.join(lacking)}: apt-get install slurm-wlm munge iproute2"
    return "" if os.geteuid() == 0 else "a Slurm cluster on one machine needs root"


def _die_with_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _ip(*arguments: str) -> bool:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    return done.returncode == 0


def _must(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class SlurmCluster:
    """A running cluster of nodes n1 … nN; a context manager."""

    def __init__(self, nodes: int = 2, cpus: int = 4) -> None:
        """Describe the cluster; entering the context starts it."""
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self.cpus = cpus
        self.folder = Path()
        self.bridge = ""
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        """Start every daemon and wait until all nodes are idle."""
        remove_leftovers()
        # Short, because a socket's path may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
        try:
            self._claim_subnet()
            self._write_files()
            self._start_controller()
            for node in self.nodes:
                self.start_node(node)
            self._until(self._all_idle, START_SECONDS)
        except BaseException:
            for log in sorted((self.folder / "log").glob("*")):
                print(f"== {log.name}\n{log.read_text()[-2000:]}", file=sys.stderr)
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop everything that runs on the nodes and everything that was started, and tidy up."""
        for node in self.nodes:
            self.crash_node(node)
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()
        self._daemons.clear()
        if self.bridge:
            _remove(self.bridge)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which Slurm's commands find this cluster."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, **options: Any) -> str:
        """Run one of Slurm's commands and return what it printed."""
        done = subprocess.run(
            command,
            env={**self.environment, **options.pop("env", {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            **options,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> int:
        """Submit a job; returns its number."""
        return int(self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=env or {}))

    def job(self, number: int) -> dict[str, str]:
        """Return what `scontrol show job` says of a job."""
        words = self.run("scontrol", "show", "job", "-o", str(number)).split()
        return dict(w.split("=", 1) for w in words if "=" in w)

    def kick(self) -> None:
        """Skip the two minutes that Slurm lets a requeued job wait.

        Three seconds stay: a job that starts again within one is lost to a revoked credential.
        """
        for line in self.run("squeue", "-h", "-t", "PD", "-o", "%i %S %r").splitlines():
            number, start, reason = line.split(maxsplit=2)
            if reason != "BeginTime" or start == "N/A":
                continue
            if (datetime.fromisoformat(start) - datetime.now()).total_seconds() > 10:
                self.run("scontrol", "update", f"JobId={number}", "StartTime=now+3")

    def wait(self, reached: Callable[[], object], seconds: float, what: str) -> None:
        """Wait until `reached()`, letting requeued jobs start at once."""

        def step() -> object:
            self.kick()
            return reached()

        try:
            self._until(step, seconds)
        except TimeoutError:
            raise TimeoutError(f"not within {seconds:.0f} s: {what}\n{self.status()}") from None

    def finished(self, number: int) -> bool:
        """Whether a job has left the queue for good."""
        return self.job(number)["JobState"] in (
            "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"
        )  # fmt: skip

    def status(self) -> str:
        """Return queue and nodes, for messages."""
        return self.run("squeue", "-l") + self.run("sinfo", "-N", "-l")

    def processes(self, node: str) -> Iterator[psutil.Process]:
        """Yield what runs on a node, its slurmd included."""
        for pid in _must("ip", "netns", "pids", f"{self.bridge}-{node}").split():
            try:
                yield psutil.Process(int(pid))
            except psutil.NoSuchProcess:
                continue

    def crash_node(self, node: str) -> None:
        """Cut a node's power."""
        if self.bridge and Path("/run/netns", f"{self.bridge}-{node}").exists():
            for process in self.processes(node):
                process.kill()

    def unplug(self, node: str) -> None:
        """Pull a node's network cable."""
        _must("ip", "link", "set", f"{self.bridge}v{node}", "down")

    def plug(self, node: str) -> None:
        """Put a node's network cable back."""
        _must("ip", "link", "set", f"{self.bridge}v{node}", "up")

    def inside(self, node: str, *command: str) -> str:
        """Run a command with a node's network and mounts, as on a shell there."""
        pid = str(self._daemons[f"slurmd-{node}"].pid)
        return _must("nsenter", f"--target={pid}", "--net", "--mount", "--uts", *command)

    def stop_daemon(self, node: str) -> None:
        """Kill a node's slurmd alone; what it started lives on."""
        self._daemons[f"slurmd-{node}"].kill()
        self._daemons[f"slurmd-{node}"].wait()

    def wait_all_idle(self, seconds: float = 60.0) -> None:
        """Wait until every node can take jobs again."""
        self._until(self._all_idle, seconds)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd, also after a crash."""
        self._start(
            f"slurmd-{node}",
            "nsenter", f"--net=/run/netns/{self.bridge}-{node}", "unshare", "-u", "-m",
            "sh", "-c", NODE, "slurmd", node, str(self.folder),
        )  # fmt: skip

    def _claim_subnet(self) -> None:
        for subnet in random.sample(range(1, 255), 254):
            if _ip("link", "add", f"{PREFIX}{subnet}", "type", "bridge"):
                self.bridge, self.network = f"{PREFIX}{subnet}", f"10.77.{subnet}"
                break
        else:
            _must("ip", "link", "add", f"{PREFIX}0", "type", "bridge")
            raise RuntimeError("all subnets of 10.77.0.0/16 are taken by other test clusters")
        _must("ip", "link", "set", self.bridge, "alias", f"{self.folder} {os.getpid()}")
        _must("ip", "addr", "add", f"{self.network}.254/24", "dev", self.bridge)
        _must("ip", "link", "set", self.bridge, "up")
        for i, node in enumerate(self.nodes, 1):
            space, cable = f"{self.bridge}-{node}", f"{self.bridge}v{node}"
            _must("ip", "netns", "add", space)
            _must(
                "ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space
            )
            _must("ip", "link", "set", cable, "master", self.bridge, "up")
            _must("ip", "-n", space, "addr", "add", f"{self.network}.{i}/24", "dev", "eth0")
            _must("ip", "-n", space, "link", "set", "eth0", "up")
            _must("ip", "-n", space, "link", "set", "lo", "up")

    def _write_files(self) -> None:
        for name in ("state", "spool", "log", "munge", "dev"):
            (self.folder / name).mkdir()
        for gpu in range(GPUS):
            # Slurm only wants to see a device; none of these answers as a GPU.
            os.mknod(self.folder / "dev" / f"gpu{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        devices = f"Name=gpu File={self.folder}/dev/gpu[0-{GPUS - 1}]\n"
        (self.folder / "gres.conf").write_text(devices)
        self.folder.chmod(0o755)
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        host = socket.gethostname().partition(".")[0]
        hosts = [f"{self.network}.{i} {node}" for i, node in enumerate(self.nodes, 1)]
        hosts += [f"{self.network}.254 {host}", "127.0.0.1 localhost", "::1 localhost"]
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        # Without name servers: a look-up of a node's address would wait five seconds for one.
        (self.folder / "nsswitch.conf").write_text("hosts: files\n")
        with socket.socket() as s:
            s.bind(("", 0))
            port = s.getsockname()[1]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={node} NodeAddr={self.network}.{i} Port=17001 "
            f"CPUs={self.cpus} RealMemory=4000 Gres=gpu:{GPUS} State=UNKNOWN"
            for i, node in enumerate(self.nodes, 1)
        )
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                name=self.bridge,
                host=host,
                address=f"{self.network}.254",
                port=port,
                folder=self.folder,
                nodes=nodes,
            )
        )

    def _start_controller(self) -> None:
        munge = self.folder / "munge"
        self._start(
            "munged", "munged", "--foreground", "--force", f"--key-file={munge}/key",
            f"--socket={munge}/socket", f"--pid-file={munge}/pid", f"--seed-file={munge}/seed",
            f"--log-file={self.folder}/log/munged.log", "--num-threads=2",
        )  # fmt: skip
        self._until((munge / "socket").exists, START_SECONDS)
        self._start("slurmctld", "slurmctld", "-c", "-D")

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - no threads here
            )

    def _all_idle(self) -> bool:
        for name, daemon in self._daemons.items():
            if daemon.poll() is not None:
                raise RuntimeError(f"{name} ended with {daemon.returncode}; see its log above")
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N"],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return len(done.stdout.split()) == len(self.nodes)

    @staticmethod
    def _until(reached: Callable[[], object], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {seconds:.0f} s")
            time.sleep(0.2)


def _remove(bridge: str) -> None:
    for space in sorted(Path("/run/netns").glob(f"{bridge}-*")):
        for pid in _must("ip", "netns", "pids", space.name).split():
            os.kill(int(pid), signal.SIGKILL)
        _must("ip", "netns", "del", space.name)
    _must("ip", "link", "del", bridge)


def remove_leftovers() -> None:
    """Remove the clusters of test runs that were killed."""
    for device in Path("/sys/class/net").glob(f"{PREFIX}[0-9]*"):
        # The nodes' cables have such names, too, and go with the bridge.
        if not (device / "bridge").is_dir():
            continue
        owner = (device / "ifalias").read_text().split()
        if owner and process_start(int(owner[-1])) is None:
            _remove(device.name)
            shutil.rmtree(owner[0], ignore_errors=True)


if __name__ == "__main__":
    with SlurmCluster(nodes=int(sys.argv[1]) if len(sys.argv) > 1 else 2) as cluster:
        print(f"export SLURM_CONF={cluster.folder}/slurm.conf   # Ctrl-C here takes it down")
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("taking it down")
