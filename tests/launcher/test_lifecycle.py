"""A run folder belongs to one living launcher, and a request to stop reaches all ranks alike."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launcher.lifecycle import (
    LaunchConfig,
    RunError,
    RunFolder,
    RunLock,
    StopReason,
    StopRequest,
    process_start,
    write_atomically,
)
from parallel.mesh import Mesh
from tests.ranks import run_ranks


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run").create()


@pytest.fixture(autouse=True)
def _signals_restored() -> object:
    before = {n: signal.getsignal(n) for n in StopRequest.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def lock(folder: RunFolder, said: list[str] | None = None) -> RunLock:
    return RunLock(folder, (said if said is not None else []).append)


def held_by(folder: RunFolder, **changes: object) -> RunLock:
    """Leave a lock in the folder as another launcher would have."""
    other = lock(folder)
    other.identity.update(changes)
    write_atomically(folder.lock, json.dumps(other.identity))
    return other


def test_the_end_of_a_run_is_on_the_disk_when_it_is_told(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        original(descriptor)
        place = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((place, os.fstat(descriptor).st_size if os.path.isfile(place) else -1))

    monkeypatch.setattr(os, "fsync", fsync)
    folder.mark_done(7)
    (file, size), (place, _) = synced
    assert Path(file).parent == folder.root and size == folder.done.stat().st_size > 0
    assert place == str(folder.root) and folder.done.exists()


def test_a_negative_timeout_is_refused_by_key() -> None:
    with pytest.raises(RunError, match=r"launch\.step_timeout is -1"):
        LaunchConfig(step_timeout=-1)


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(RunError, match=r"runs/demo: Not a directory"):
        RunFolder(tmp_path / "runs" / "demo").create()


def test_the_heartbeat_tells_step_host_and_time(folder: RunFolder) -> None:
    before = time.time()
    folder.beat(7)
    after = time.time()
    beat = json.loads(folder.heartbeat.read_text())
    assert (beat["step"], beat["host"]) == (7, socket.gethostname())
    # In milliseconds.
    assert before - 0.001 <= beat["time"] <= after + 0.001


def test_a_reader_never_sees_half_a_heartbeat(folder: RunFolder) -> None:
    stop = threading.Event()

    def write() -> None:
        step = 0
        while not stop.is_set():
            folder.beat(step := step + 1, "x" * (step % 200))

    folder.beat(0)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(500):
            json.loads(folder.heartbeat.read_text())
    finally:
        stop.set()
        writer.join()


def test_a_second_launcher_is_refused_with_pid_and_host(folder: RunFolder) -> None:
    code = (
        "import sys; from pathlib import Path; from launcher.lifecycle import *\n"
        f"lock = RunLock(RunFolder(Path({str(folder.root)!r}))).acquire()\n"
        "print('held', flush=True); sys.stdin.read(); lock.release()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=f"process {holder.pid} on {socket.gethostname()}"):
            lock(folder).acquire()
        holder.communicate(b"")
    with lock(folder):
        assert folder.lock.exists()
    assert not folder.lock.exists()


def test_the_lock_of_a_killed_launcher_is_taken_over(folder: RunFolder) -> None:
    code = (
        "import os; from pathlib import Path; from launcher.lifecycle import *\n"
        f"RunLock(RunFolder(Path({str(folder.root)!r}))).acquire()\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    said: list[str] = []
    with lock(folder, said):
        assert "taking over" in said[0]


def test_a_reused_pid_is_not_the_holder(folder: RunFolder) -> None:
    started = process_start(os.getpid())
    assert started is not None
    held_by(folder, started=started - 1)
    with lock(folder):
        pass


def test_an_earlier_try_of_the_same_slurm_job_is_taken_over_at_once(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    held_by(folder, here="another machine", host="n9", job="17")
    said: list[str] = []
    with lock(folder, said):
        assert "taking over" in said[0], "nothing was observed before"


def test_a_lock_on_another_node_counts_as_long_as_it_is_touched(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = held_by(folder, here="another machine", host="n9", pid=5)
    refused = threading.Event()

    def touch() -> None:
        while not refused.wait(0.1):
            os.utime(other.path)

    toucher = threading.Thread(target=touch)
    toucher.start()
    try:
        with pytest.raises(RunError, match="process 5 on n9"):
            lock(folder).acquire()
    finally:
        refused.set()
        toucher.join()
    monkeypatch.setattr(RunLock, "OBSERVE", 1.5)
    with lock(folder) as mine:
        assert json.loads(folder.lock.read_text()) == mine.identity


def test_a_lock_that_is_touched_while_its_observer_is_held_up_counts(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = held_by(folder, here="another machine", host="n9", pid=5)
    moments = itertools.chain([0.0], itertools.repeat(2 * RunLock.OBSERVE))

    def held_up_before_it_returns() -> float:
        now = next(moments)
        os.utime(other.path, (now, now))
        return now

    monkeypatch.setattr("launcher.lifecycle.time.monotonic", held_up_before_it_returns)
    with pytest.raises(RunError, match="process 5 on n9"):
        lock(folder).acquire()


def test_an_unreadable_lock_is_taken_over_when_nobody_touches_it(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunLock, "OBSERVE", 1.0)
    folder.lock.touch()
    with lock(folder):
        pass


def test_a_launcher_that_lost_its_lock_stops(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunLock, "REFRESH", 0.0)
    with lock(folder) as mine:
        mine.refresh()
        held_by(folder, pid=5)
        with pytest.raises(RunError, match="lost the lock"):
            mine.refresh()
    assert json.loads(folder.lock.read_text())["pid"] == 5


@pytest.mark.parametrize("number", StopRequest.SIGNALS)
def test_a_signal_asks_to_stop(folder: RunFolder, number: signal.Signals) -> None:
    stop = StopRequest(folder)
    assert not stop.requested(1)
    os.kill(os.getpid(), number)
    assert stop.requested(2) is StopReason.SIGNAL


def test_a_second_interrupt_ends_at_once_but_a_second_term_does_not(folder: RunFolder) -> None:
    StopRequest(folder)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_stop_files_ask_to_stop_and_say_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_ONN_TRY", "job3-try1")
    folder = RunFolder(tmp_path).create()
    stop = StopRequest(folder)
    (folder.logs / "job3-try0.stop").touch()
    assert not stop.requested(1)
    (folder.logs / "job3-try1.stop").touch()
    assert stop.requested(2) is StopReason.TRY_STOP_FILE
    folder.stop.touch()
    assert stop.requested(3) is StopReason.STOP_FILE


def _stops_at(mesh: Mesh, root: str, asked: int, by_file: bool) -> int:
    folder = RunFolder(Path(root))
    stop = StopRequest(folder, mesh)
    for step in range(20):
        if step == asked and mesh.rank == mesh.world - 1:
            if by_file:
                folder.stop.touch()
            else:
                os.kill(os.getpid(), signal.SIGUSR1)
        if stop.requested(step):
            return step
    stop.finish()
    return -1


def test_all_ranks_stop_after_the_same_step_whoever_got_the_signal(folder: RunFolder) -> None:
    assert run_ranks(_stops_at, 2, str(folder.root), 5, False) == [6, 6]


def test_all_ranks_heed_a_stop_file(folder: RunFolder) -> None:
    steps = run_ranks(_stops_at, 2, str(folder.root), 5, True)
    assert steps[0] == steps[1] in (5, 6, 7)


def test_without_a_request_nobody_stops(folder: RunFolder) -> None:
    assert run_ranks(_stops_at, 2, str(folder.root), 99, False) == [-1, -1]
