"""A rank that hangs ends by itself, and its report shows where it hung."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.lifecycle import LaunchConfig, RunFolder
from launcher.watchdog import EXIT_HUNG, Watchdog

PRELUDE = """
import sys, time
from pathlib import Path
from launcher import watchdog
from launcher.lifecycle import LaunchConfig, RunFolder
watchdog.PEERS_GRACE = 0.2
folder = RunFolder(Path(sys.argv[1])).create()
def watch(first, step):
    cfg = LaunchConfig(first_step_timeout=first, step_timeout=step)
    return watchdog.Watchdog(folder, cfg, rank=0).start()
"""

# Time passes when told to, and not while a busy machine lets this process wait. The watchdog looks
# as often as ever.
CLOCK = """
import threading
class Clock:
    now, looks, looked, holds_up = 0.0, 0, threading.Condition(), False
    sleep = staticmethod(time.sleep)
    def monotonic(self):
        with self.looked:
            if threading.current_thread().name == "watchdog":
                self.looks += 1
                self.looked.notify_all()
            elif self.holds_up:
                self.two_looks()
            return self.now
    def passes(self, seconds):
        with self.looked:
            self.now += seconds
            self.two_looks()
    def two_looks(self):
        # When the second one begins, the first has taken its consequences.
        seen = self.looks
        self.looked.wait_for(lambda: self.looks >= seen + 2)
clock = watchdog.time = Clock()
"""


def run(root: Path, code: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(root)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_a_hang_in_c_code_ends_with_the_stacks_in_the_logs(tmp_path: Path) -> None:
    code = """
import socket
def wait_for_a_peer():
    a, b = socket.socketpair()
    a.recv(1)
dog = watch(60, 0.5)
dog.beat(3)
wait_for_a_peer()
"""
    done = run(tmp_path, code)
    assert done.returncode == EXIT_HUNG
    assert "rank 0 hung" in done.stderr
    assert "'step' of step 3" in done.stderr
    assert "launch.step_timeout" in done.stderr
    (report,) = (tmp_path / "logs").glob("*-rank0.hang.json")
    assert "wait_for_a_peer" in report.read_text()
    assert str(report) in done.stderr


def test_a_hang_in_a_collective_ends(tmp_path: Path) -> None:
    code = """
import torch.distributed as dist
from datetime import timedelta
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
dog = watch(0.5, 0.5)
dist.init_process_group("gloo", store=store, rank=0, world_size=2, timeout=timedelta(hours=1))
"""
    done = run(tmp_path, code)
    assert done.returncode == EXIT_HUNG, done.stderr
    assert "launch.first_step_timeout" in done.stderr


def test_the_first_step_has_its_own_limit(tmp_path: Path) -> None:
    code = """
dog = watch(60, 0.5)
dog.beat(0, "model built")
time.sleep(1.5)
dog.beat(1)
print("first step", flush=True)
time.sleep(100)
"""
    done = run(tmp_path, code)
    assert (done.returncode, done.stdout) == (EXIT_HUNG, "first step\n")


def test_a_hang_that_holds_the_interpreter_lock_ends_too(tmp_path: Path) -> None:
    code = """
import ctypes, faulthandler
later = faulthandler.dump_traceback_later
faulthandler.dump_traceback_later = lambda t, exit: later(1.5, exit=exit)
dog = watch(0.8, 0.8)
clock.passes(0.5)
ctypes.PyDLL(None).sleep(100)
"""
    done = run(tmp_path, CLOCK + code)
    assert done.returncode == 1
    assert "Timeout" in done.stderr


def test_a_zero_limit_behind_a_first_step_with_one_waits_forever(tmp_path: Path) -> None:
    code = """
import faulthandler
later = faulthandler.dump_traceback_later
faulthandler.dump_traceback_later = lambda t, exit: later(4, exit=exit)
dog = watch(1, 0)
clock.passes(0.5)
dog.beat(1)
clock.passes(100)
time.sleep(5)
print("still here")
dog.close()
"""
    done = run(tmp_path, CLOCK + code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "still here\n", "")


def test_beats_pauses_and_a_zero_limit_keep_a_process_alive(tmp_path: Path) -> None:
    code = """
dog = watch(0.6, 0.6)
for step in range(5):
    clock.passes(0.5)
    dog.beat(step)
with dog.paused():
    clock.passes(100)
clock.passes(0.5)
dog.close()
dog = watch(0, 0)
clock.passes(100)
dog.close()
clock.now += 100
time.sleep(1)
"""
    done = run(tmp_path, CLOCK + code)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_look_in_the_very_moment_when_a_pause_ends_is_no_hang(tmp_path: Path) -> None:
    code = """
dog = watch(0.6, 0.6)
with dog.paused():
    clock.passes(100)
    clock.holds_up = True
print("goes on")
dog.close()
"""
    done = run(tmp_path, CLOCK + code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "goes on\n", "")


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_writes_the_heartbeat(tmp_path: Path, rank: int) -> None:
    folder = RunFolder(tmp_path).create()
    Watchdog(folder, LaunchConfig(), rank).beat(1)
    assert folder.heartbeat.exists() == (rank == 0)


def test_a_beat_costs_next_to_nothing(tmp_path: Path) -> None:
    dog = Watchdog(RunFolder(tmp_path).create(), LaunchConfig(), 0).start()
    costs = []
    for step in range(50):
        start = time.perf_counter()
        dog.beat(step)
        costs.append(time.perf_counter() - start)
    assert min(costs) < 0.002
    dog.close()
