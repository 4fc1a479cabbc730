"""A node's ranks start together, end together, and leave nothing behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from launcher.lifecycle import LaunchConfig, RunError, RunFolder
from launcher.ranks import Rendezvous, launch, usable_cores, visible_gpus
from tests.processes import ended

PATIENCE = 60.0
"""Seconds for what takes a fraction of one: the machine may be busy. What sleeps sleeps longer."""

LAUNCH = """
import sys
from pathlib import Path
from launcher.lifecycle import LaunchConfig, RunFolder
from launcher.ranks import launch
try:
    code = launch(["-c", sys.argv[2]], RunFolder(Path(sys.argv[1])), LaunchConfig(processes=2))
except KeyboardInterrupt:
    code = 130
sys.exit(code)
"""
STOPPABLE = """
import os, sys, time
from pathlib import Path
from launcher.lifecycle import RunFolder, StopRequest
stop = StopRequest(RunFolder(Path("/nonexistent")))
print("ready", flush=True)
while not stop.requested(0):
    time.sleep(0.02)
print("saved", flush=True)
"""
SLEEPER = """
import subprocess, time
child = subprocess.Popen(["sleep", "300"])
print("child", child.pid, flush=True)
time.sleep(300)
"""


@pytest.fixture(autouse=True)
def _no_job_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "TINY_ONN_TRY", "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def background(folder: RunFolder, code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(folder.root), code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until_logged(folder: RunFolder, word: str, ranks: int = 2) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        logs = list(folder.logs.glob("*-rank*.log"))
        if sum(word in log.read_text() for log in logs) == ranks:
            return
        time.sleep(0.05)
    raise AssertionError(f"{word!r} is not in {ranks} logs of {folder.logs}")


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not (all_ended := all(map(ended, processes))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return all_ended


def test_ranks_get_torchruns_environment_and_rank_0_is_shown(
    folder: RunFolder, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    places = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    code = (
        f"import os; print(*(os.environ[n] for n in {places}), "
        "os.environ['MASTER_ADDR'], os.environ['OMP_NUM_THREADS'], os.environ['NCCL_DEBUG'])"
    )
    cfg = LaunchConfig(processes=3, threads=2, environment={"NCCL_DEBUG": "WARN"})
    assert launch(["-c", code], folder, cfg) == 0
    logs = sorted(folder.logs.glob("*.log"))
    assert [log.read_text() for log in logs] == [
        f"{r} 3 {r} 3 127.0.0.1 2 WARN\n" for r in range(3)
    ]
    assert capfdbinary.readouterr().out == b"0 3 0 3 127.0.0.1 2 WARN\n"


def test_the_cores_are_shared_among_the_ranks(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "1")
    assert usable_cores() == 1
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert launch(["-c", code], folder, LaunchConfig(processes=2)) == 0
    assert {log.read_text() for log in folder.logs.glob("*.log")} == {"1\n"}


def test_a_failing_rank_ends_the_others_at_once_and_is_named(
    folder: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    code = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '1': sys.exit('disk is full')\n"
        "time.sleep(300)"
    )
    before = time.monotonic()
    assert launch(["-c", code], folder, LaunchConfig(processes=2)) == 1
    assert time.monotonic() - before < PATIENCE
    text = capfd.readouterr().err
    assert "rank 1 failed with exit code 1; its log:" in text
    assert "| disk is full" in text


def test_a_killed_rank_is_named_with_its_signal(
    folder: RunFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # A pipe ends when its last writer does.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code = (
        "import os, sys\n"
        f"pipe = open({str(pipe)!r}, 'w' if os.environ['RANK'] == '1' else 'r')\n"
        "if os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\n"
        "pipe.read(); sys.exit('connection closed by peer')"
    )
    assert launch(["-c", code], folder, LaunchConfig(processes=2)) == 1
    assert "rank 1 was killed by SIGKILL" in capfd.readouterr().err


def test_a_rank_that_is_killed_while_the_launcher_looks_at_the_others_is_the_one_named(
    folder: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pipe, looked = tmp_path / "pipe", tmp_path / "looked"
    os.mkfifo(pipe)
    code = (
        "import os, sys, time\n"
        f"pipe = open({str(pipe)!r}, 'w' if os.environ['RANK'] == '0' else 'r')\n"
        "if os.environ['RANK'] == '0':\n"
        f"    while not os.path.exists({str(looked)!r}): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), 9)\n"
        "pipe.read(); sys.exit('connection closed by peer')"
    )
    poll = subprocess.Popen.poll

    def slowly(process: subprocess.Popen[bytes]) -> int | None:
        """See that rank 0 lives, and be held up until both have ended."""
        found = poll(process)
        if not looked.exists():
            ranks = [p for p in descendants(os.getpid()) if str(looked) in " ".join(p.cmdline())]
            looked.touch()
            assert len(ranks) == 2 and gone(ranks)
        return found

    monkeypatch.setattr(subprocess.Popen, "poll", slowly)
    assert launch(["-c", code], folder, LaunchConfig(processes=2)) == 1
    assert "rank 0 was killed by SIGKILL" in capfd.readouterr().err


def test_a_hung_rank_is_called_hung(folder: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(["-c", "import os; os._exit(86)"], folder, LaunchConfig(processes=1)) == 1
    (report,) = folder.logs.glob("*-hang.txt")
    said = capfd.readouterr().err
    assert "rank 0 on" in said and "is late: process is ended" in said and str(report) in said


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_and_they_end_well(
    folder: RunFolder, number: signal.Signals
) -> None:
    with background(folder, STOPPABLE) as launcher:
        until_logged(folder, "ready")
        launcher.send_signal(number)
        _, err = launcher.communicate(timeout=PATIENCE)
    until_logged(folder, "saved")
    assert launcher.returncode == 0, err
    assert number.name in err


def test_a_second_interrupt_ends_at_once(folder: RunFolder) -> None:
    deaf = STOPPABLE.replace("while not stop.requested(0)", "while True")
    with background(folder, deaf) as launcher:
        until_logged(folder, "ready")
        launcher.send_signal(signal.SIGINT)
        # The kernel makes one of two that come before the first is handled.
        assert launcher.stderr is not None
        assert "Ctrl-C again ends it at once" in launcher.stderr.readline()
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGINT)
        launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 130


def test_a_signal_before_training_is_no_failure(folder: RunFolder) -> None:
    with background(folder, SLEEPER) as launcher:
        until_logged(folder, "child")
        launcher.terminate()
        _, err = launcher.communicate(timeout=PATIENCE)
    assert launcher.returncode == 128 + signal.SIGTERM
    # Whichever is seen to have ended first.
    assert re.search(r"SIGTERM ended rank [01] before it could save", err)


def test_a_killed_launcher_takes_its_ranks_along(folder: RunFolder) -> None:
    with background(folder, "import time; print('up', flush=True); time.sleep(300)") as launcher:
        until_logged(folder, "up")
        ranks = descendants(launcher.pid)
        assert len(ranks) == 2
        launcher.kill()
    assert gone(ranks)


def test_what_a_rank_started_ends_with_it(folder: RunFolder) -> None:
    with background(folder, SLEEPER) as launcher:
        until_logged(folder, "child")
        family = descendants(launcher.pid)
        assert len(family) == 4
        os.kill(next(p.pid for p in family if "python" in p.name()), signal.SIGKILL)
        launcher.communicate(timeout=PATIENCE)
    assert gone(family)


def test_a_second_launcher_on_the_folder_is_refused_and_leaves_word(folder: RunFolder) -> None:
    with background(folder, STOPPABLE) as launcher:
        until_logged(folder, "ready")
        with pytest.raises(RunError, match=f"in use by process {launcher.pid} on"):
            launch(["-c", "print('second')"], folder, LaunchConfig(processes=1))
        assert "in use" in folder.refused.read_text()
        launcher.terminate()
    assert not folder.lock.exists()


def test_a_stop_file_keeps_a_run_from_starting(
    folder: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    folder.create().stop.touch()
    assert launch(["-c", "raise SystemExit(9)"], folder, LaunchConfig(processes=1)) == 0
    assert f"rm {folder.stop}" in capfd.readouterr().out


NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "20001"}


def test_the_nodes_rendezvous_is_read_from_the_environment() -> None:
    place = Rendezvous.from_environment({**NODES, "TINY_ONN_NODES": "n1 n2"})
    assert place == Rendezvous(2, 1, "n1", 20001, ("n1", "n2"))


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_port_is_kept_for_rank_0_until_it_comes(nodes: int) -> None:
    c10d: Any = dist
    with Rendezvous(nodes, 0, "127.0.0.1", 0).held() as place:
        for address in ("127.0.0.1", ""):
            with socket.socket() as s, pytest.raises(OSError, match="in use"):
                s.bind((address, place.port))
        store = c10d.TCPStore("127.0.0.1", place.port, is_master=True, wait_for_workers=False)
        store.set("here", "1")
        assert c10d.TCPStore("127.0.0.1", place.port, is_master=False).get("here") == b"1"
        assert place == Rendezvous(nodes, 0, "127.0.0.1", store.port)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_ADDR": ""}, "lacks MASTER_ADDR"),
        ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "lacks MASTER_ADDR, MASTER_PORT"),
        ({"MASTER_ADDR": "localhost"}, "MASTER_ADDR is localhost"),
        ({"MASTER_ADDR": "127.0.1.1"}, r"MASTER_ADDR is 127\.0\.1\.1"),
        ({"MASTER_PORT": "auto"}, "MASTER_PORT='auto' is not a number"),
        ({"NODE_RANK": "2"}, "NODE_RANK 2 is not below NNODES 2"),
    ],
)
def test_several_nodes_never_fall_back_to_localhost(change: dict[str, str], message: str) -> None:
    with pytest.raises(RunError, match=message):
        Rendezvous.from_environment({**NODES, **change})


def test_a_node_name_that_is_this_machines_loopback_is_refused() -> None:
    place = Rendezvous(2, 1, "127.0.0.1", 20001, ("localhost", "n2"))
    with pytest.raises(RunError, match="reaches localhost only as 127"):
        place.interface()


def test_a_node_name_that_does_not_resolve_is_named_and_may_be_tried_again(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_ONN_NODES", "no-such-node.invalid n2")
    for name, value in NODES.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=r"cannot resolve node name no-such-node\.invalid"):
        launch(["-c", "print('ran')"], folder, LaunchConfig(processes=1))
    assert folder.logs.is_dir() and not folder.refused.exists()


@pytest.mark.parametrize(
    ("listed", "count"), [("0,1,3", 3), ("", 0), ("NoDevFiles", 0), ("-1", 0), ("GPU-4f,GPU-5a", 2)]
)
def test_gpus_are_counted_from_what_slurm_left_visible(
    monkeypatch: pytest.MonkeyPatch, listed: str, count: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert visible_gpus() == count


@pytest.fixture(autouse=True)
def _signals_restored() -> Iterator[None]:
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(n) for n in numbers]
    yield
    assert [signal.getsignal(n) for n in numbers] == before
