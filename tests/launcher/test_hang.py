"""A hang ends the run with one report: the late rank, and the collective that it is late for."""

from __future__ import annotations

import faulthandler
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import beats, hang_watch
from launcher.beats import BeatBoard, Beater
from launcher.hang import Word, judge
from launcher.lifecycle import LaunchConfig, RunFolder
from launcher.ranks import launch

RANK = """\
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from launcher import watchdog
from launcher.lifecycle import LaunchConfig, RunFolder
watchdog.PEERS_GRACE = 6.0
folder = RunFolder(Path(sys.argv[1]))
rank = int(os.environ["RANK"])
dog = watchdog.Watchdog(folder, LaunchConfig(step_timeout=3, first_step_timeout=120), rank).start()
dist.init_process_group("gloo")
for step in range(1, 4):
    dist.all_reduce(torch.ones(8))
    dog.beat(step)
def read_a_shard():
    time.sleep(600)
"""


def word(rank: int, numbers: dict[str, int], **fields: Any) -> Word:
    collectives = [
        {"group": g, "number": i, "operation": f"op{i}", "sizes": [[4]], "state": "scheduled"}
        for g, n in numbers.items()
        for i in range(max(1, n - 2), n + 1)
    ]
    return Word(rank, f"n{rank}", "S", fields.pop("step", 7), collectives=collectives, **fields)


def test_late_is_who_has_begun_fewer_collectives_than_the_others() -> None:
    verdict = judge([word(0, {"world": 9}), word(1, {"world": 7}), word(2, {"world": 9})])
    assert verdict.late == (1,)
    assert verdict.reason == "has not begun op8 of [[4]], number 8 of world"


def test_late_is_who_is_waited_for_and_waits_for_no_one() -> None:
    # 0 waits for 1 in the world, 1 waits for 2 in a smaller group.
    words = [word(0, {"world": 9}), word(1, {"world": 8, "pair": 5}), word(2, {"pair": 4})]
    assert judge(words).late == (2,)


def test_a_stopped_process_is_late_whatever_it_had_begun() -> None:
    words = [word(0, {"world": 9}), word(1, {"world": 9})]
    words[1].state = "T"
    verdict = judge(words)
    assert (verdict.late, verdict.reason) == ((1,), "process is stopped by a signal")


def test_what_the_others_wait_in_is_told_where_the_stopped_one_left_no_word_of_its_own() -> None:
    verdict = judge([word(0, {"world": 4}), Word(1, "n1", "T")])
    assert (verdict.late, verdict.waits) == ((1,), "op4 of [[4]], number 4 of world")


def test_a_rank_without_a_word_is_late() -> None:
    verdict = judge([word(0, {"world": 9}), Word(1, "")])
    assert verdict.late == (1,)
    assert "left no word" in verdict.reason


def test_nobody_is_late_where_all_are_in_the_same_place() -> None:
    verdict = judge([word(0, {"world": 9}), word(1, {"world": 9})])
    assert verdict.late == ()
    assert verdict.waits == "op9 of [[4]], number 9 of world"


def hang(
    root: Path, code: str, processes: int, capfd: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    """Run ranks that hang; returns what the launcher said and the report."""
    folder = RunFolder(root).create()
    cfg = LaunchConfig(processes=processes, threads=1, first_step_timeout=120, step_timeout=3)
    assert launch(["-c", RANK + code, str(root)], folder, cfg) == 1
    (report,) = folder.logs.glob("*-hang.txt")
    said = capfd.readouterr().err
    assert str(report) in said
    return said, report.read_text()


def test_the_report_names_a_rank_that_sleeps_and_what_the_others_wait_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "dist.barrier() if rank != 1 else read_a_shard()"
    said, report = hang(tmp_path, code, 3, capfd)
    assert "rank 1 on" in said and "is late: has not begun gloo:barrier" in said
    assert "read_a_shard" in report
    assert "== stacks of rank 1" in report
    assert "== last collectives of rank 2" in report
    assert "gloo:all_reduce [[8]]" in report


def test_the_report_names_a_stopped_process_and_has_its_stacks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # The main thread's stack comes after those of all these threads.
    code = """
import threading
def deep(n):
    deep(n - 1) if n else time.sleep(600)
def stops():
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)
if rank == 1:
    for _ in range(80):
        threading.Thread(target=deep, args=(90,), daemon=True).start()
    stops()
dist.all_reduce(torch.ones(3))
"""
    said, report = hang(tmp_path, code, 2, capfd)
    assert "rank 1 on" in said and "process is stopped by a signal" in said
    assert "the others wait in gloo:all_reduce of [[3]]" in said
    assert "in stops" in report


@pytest.mark.gpu
def test_on_nccl_the_report_names_the_late_rank_and_the_collective(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    code = """
torch.cuda.set_device(rank)
group = dist.new_group(backend="nccl")
ones = torch.ones(16, device="cuda")
for step in range(4, 6):
    dist.all_reduce(ones, group=group)
    torch.cuda.synchronize()
    dog.beat(step)
if rank == 1:
    read_a_shard()
dist.all_reduce(ones[:5], group=group)
torch.cuda.synchronize()
"""
    said, report = hang(tmp_path, code, 2, capfd)
    assert "rank 1 on" in said and "is late: has not begun nccl:all_reduce" in said, report
    assert "read_a_shard" in report


def test_a_rank_that_holds_the_interpreter_lock_is_ended_and_has_its_stacks(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hang_watch, "PATIENCE", 1.0)
    code = """
import ctypes
libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
libc.pthread_mutex_lock(mutex)
def holds_the_lock():
    libc.pthread_mutex_lock(mutex)  # unlike sleep(), it does not return when a signal comes
holds_the_lock()
"""
    said, report = hang(tmp_path, code, 1, capfd)
    assert "no rank is behind" in said
    assert "in holds_the_lock" in report


def test_a_rank_that_hangs_before_it_can_watch_itself_is_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hang_watch, "PATIENCE", 1.0)
    folder = RunFolder(tmp_path).create()
    cfg = LaunchConfig(processes=1, first_step_timeout=1)
    assert launch(["-c", "import time; time.sleep(600)"], folder, cfg) == 1
    assert "start" in next(folder.logs.glob("*-hang.txt")).read_text()


def test_a_beat_reaches_the_launcher() -> None:
    board = BeatBoard(2, limit=300)
    assert not board.read(1).hung
    code = "from launcher.beats import Beater; import os; b = Beater(); "
    code += "b.write(5.0, 12, False, 'validation batch')"
    run_with(board, 1, code)
    beat = board.read(1)
    assert (beat.step, beat.limit, beat.doing, beat.listens) == (12, 5.0, "validation batch", True)
    assert 0 <= beat.silent < 300
    assert board.read(0).doing == "start"
    board.close()


class Stopped(struct.Struct):
    """Writes a part of a beat, as a process does that is stopped right then."""

    def pack_into(self, buffer: Any, offset: int, *values: Any) -> None:
        super().pack_into(buffer, offset, 0.0, *values[1:])
        raise InterruptedError


class Overtaken(struct.Struct):
    """Is held up over the first read until two more beats have come."""

    def __init__(self, layout: str, beater: Beater) -> None:
        super().__init__(layout)
        self.coming: list[int] = [13, 14]
        self.beater = beater

    def unpack_from(self, buffer: Any, offset: int = 0) -> tuple[Any, ...]:
        _, *others = super().unpack_from(buffer, offset)
        while self.coming:
            self.beater.write(5.0, self.coming.pop(0), False, "step")
        return super().unpack_from(buffer, offset)[0], *others


def test_a_beat_is_read_whole_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = beats.BEAT.format
    board = BeatBoard(1, limit=30)
    monkeypatch.setenv("TINY_ONN_BEAT", board.variable(0))
    beater = Beater()
    try:
        beater.write(5.0, 11, True, "validation")
        beater.write(5.0, 12, False, "step")
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(beats, "BEAT", Stopped(layout))
            beater.write(5.0, 13, False, "step")
        assert board.read(0).step == 12 and board.read(0).silent < 1000
        monkeypatch.setattr(beats, "BEAT", Overtaken(layout, beater))
        assert board.read(0).step == 14
    finally:
        faulthandler.unregister(beats.STACKS_SIGNAL)
        board.close()


def run_with(board: BeatBoard, local: int, code: str) -> None:
    subprocess.run(
        [sys.executable, "-c", code],
        env={"TINY_ONN_BEAT": board.variable(local)},
        pass_fds=board.descriptors(local),
        check=True,
        timeout=200,
    )
