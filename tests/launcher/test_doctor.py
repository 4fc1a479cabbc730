"""The doctor finds what would stop a run, and says what to do about it."""

from __future__ import annotations

import importlib.metadata
import mmap
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher import doctor
from launcher.doctor import Finding, Level, Places
from launcher.lifecycle import RunFolder

Check = Callable[[Places], Iterator[Finding]]


def findings(check: Check, level: Level, places: Places | None = None) -> list[Finding]:
    return [f for f in check(places or Places()) if f.level is level]


def only(check: Check, level: Level, places: Places | None = None) -> Finding:
    (finding,) = findings(check, level, places)
    assert finding.remedy or level is Level.OK
    return finding


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_this_machine_can_train_and_the_report_is_quick(tmp_path: Path) -> None:
    before, busy = time.monotonic(), _children_seconds()
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "doctor", "--runs", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=doctor.REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch" in done.stdout
    assert "0 to fix" in done.stdout
    # Its own time, and no wait of minutes on a machine that others keep busy.
    assert _children_seconds() - busy < 30
    assert time.monotonic() - before < 200


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_a_fail_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = Finding(Level.FAIL, "disk", "[full]", "free some")
    monkeypatch.setattr(doctor, "CHECKS", (lambda places: iter([bad]),))
    assert doctor.main(["--runs", str(tmp_path)]) == 1


def test_a_missing_and_a_wrong_package_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "zstandard":
            raise importlib.metadata.PackageNotFoundError
        return "0.1.0" if name == "deepspeed" else importlib.metadata.distribution(name).version

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "zstandard" in only(doctor.packages, Level.FAIL).found
    assert "deepspeed 0.1.0, but ==" in only(doctor.packages, Level.WARN).found


def test_a_strangers_kernels_package_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    info = tmp_path / "kernels-0.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "kernels 0.9.0 is installed" in only(doctor.rooms, Level.WARN).found


def test_a_strangers_kernels_that_would_be_imported_fails(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    code = (
        "import sys; sys.path.append(sys.argv[1]); from launcher import doctor\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "print([f.found for f in doctor.rooms(doctor.Places()) if f.level is doctor.Level.FAIL])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(doctor.REPOSITORY), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert f"import kernels finds {tmp_path}" in done.stdout


def test_a_gpu_that_torch_cannot_use_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program(tmp_path, "nvidia-smi", "echo 'NVIDIA H100, 81559 MiB, 580.1'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("torch.version.cuda", None)
    assert only(doctor.gpus, Level.OK).found.startswith("1 x NVIDIA H100")
    assert "cannot use them" in only(doctor.gpus, Level.FAIL).found


def test_missing_compilers_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda p: None if p in ("g++", "ninja") else which(p))
    assert only(doctor.compilers, Level.WARN).remedy == "apt-get install g++ ninja-build"


def test_an_architecture_list_that_deepspeed_cannot_read_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0a 10.0f+PTX")
    assert "'8.0 9.0 10.0+PTX'" in only(doctor.operators, Level.FAIL).remedy


@pytest.mark.parametrize(
    ("free", "level"), [(1 << 20, Level.FAIL), (5 << 30, Level.WARN), (500 << 30, Level.OK)]
)
def test_disk_space_is_judged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, level: Level
) -> None:
    usage = shutil._ntuple_diskusage(1 << 50, 0, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    only(doctor.disks, level, Places(tmp_path / "not" / "yet"))


def test_a_folder_that_cannot_be_written_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"{tmp_path} is not writable" in only(doctor.disks, Level.FAIL, Places(tmp_path)).found


def test_only_unused_shared_memory_counts_as_left_behind(tmp_path: Path) -> None:
    unused, used = tmp_path / "000001_locals", tmp_path / "000002_barrier"
    (tmp_path / "something_else").write_bytes(b"x")
    unused.write_bytes(b"x" * 4096)
    used.write_bytes(b"x" * 4096)
    with used.open("r+b") as f, mmap.mmap(f.fileno(), 4096):
        assert doctor.stale_segments(tmp_path) == [unused]
        found = only(doctor.shared_memory, Level.WARN, Places(shared_memory=tmp_path))
        assert f"rm {unused}" in found.remedy


def test_a_host_name_that_does_not_resolve_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "no-such-host.invalid")
    assert "no-such-host.invalid does not resolve" in only(doctor.network, Level.WARN).found


@pytest.mark.parametrize("call", ["create_server", "create_connection"])
def test_a_port_that_cannot_be_opened_or_reached_has_to_be_fixed(
    monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*words: object, **more: object) -> None:
        raise PermissionError(1, "not permitted here")

    monkeypatch.setattr(f"socket.{call}", refuse)
    finding = only(doctor.network, Level.FAIL)
    assert "cannot connect to an own port" in finding.found
    assert "not permitted here" in finding.found
    assert "127.0.0.1" in finding.remedy
    monkeypatch.undo()
    assert not findings(doctor.network, Level.FAIL)


def test_runs_are_listed_with_their_state(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        RunFolder(tmp_path / name).create().config.touch()
    RunFolder(tmp_path / "a").mark_done(3)
    RunFolder(tmp_path / "b").beat(3)
    states = [f.found for f in doctor.running(Places(tmp_path))]
    assert states[0].endswith("a: done")
    assert "last heartbeat 0 minutes ago" in states[1]
    assert states[2].endswith("c: no step yet")


def test_a_cluster_that_does_not_answer_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program(tmp_path, "sbatch", "true")
    program(tmp_path, "sinfo", "echo 'fatal: no controller' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert "fatal: no controller" in only(doctor.slurm, Level.WARN).found
