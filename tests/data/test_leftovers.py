"""A killed run's shared memory goes when the data set is opened again; nobody else's is touched."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from data import leftovers
from data.build import build
from data.leftovers import SHM, left_behind
from tests.data.conftest import SEQ_LEN, Loaders, recipe

SCRIPT = """
    import sys
    from data.config import DataConfig
    from data.loader import PackedLoader
    path = sys.argv[1]
    config = DataConfig(path=path, seq_len={seq_len}, cache=path + "-cache")
    loader = PackedLoader(config, micro_batch=2, accumulation=2, rank=0, world=1)
    first = loader.next_step()[0].ids_T.sum().item()
    print(loader._samples.prefix, loader._held_out.prefix, first, flush=True)
    sys.stdin.read()
"""


def start(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT).format(seq_len=SEQ_LEN), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def prefixes(process: subprocess.Popen[str]) -> tuple[list[str], int]:
    assert process.stdout is not None
    train, held_out, first = (int(n) for n in process.stdout.readline().split())
    return [f"{train:06}", f"{held_out:06}"], first


def files_of(names: list[str]) -> dict[Path, tuple[int, int]]:
    """Segments and lock files under these numbers, and which file each one is.

    Other programs take the same numbers as soon as they are free: a name alone says nothing.
    """
    places = (SHM, Path(tempfile.gettempdir()))
    found = [p for n in names for place in places for p in place.glob(f"{n}_*")]
    return {p: identity(p) for p in found}


def identity(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except FileNotFoundError:
        return (0, 0)
    return found.st_ino, found.st_ctime_ns


def still_there(files: dict[Path, tuple[int, int]]) -> dict[Path, tuple[int, int]]:
    return {p: i for p, i in files.items() if identity(p) == i}


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill the run with its helper that would otherwise clear its shared memory away."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_to_its_end(path: Path) -> tuple[dict[Path, tuple[int, int]], int]:
    process = start(path)
    names, first = prefixes(process)
    files = files_of(names)
    assert files
    process.communicate()
    assert process.returncode == 0
    return files, first


@pytest.fixture
def living(copied: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of the copied corpus that stays alive."""
    process = start(copied)
    yield process
    kill_all(process)


def claims(folder: Path) -> list[Path]:
    """Claims on the splits of a corpus."""
    found = []
    for path in SHM.glob(f"tiny-onn.{os.geteuid()}.*.*"):
        # Those of other programs come and go.
        with suppress(FileNotFoundError):
            if f'"folder": "{folder}/' in path.read_text():
                found.append(path)
    return found


def test_a_run_that_ends_leaves_nothing(copied: Path) -> None:
    files, _ = run_to_its_end(copied)
    assert still_there(files) == {}
    assert claims(copied) == []


def test_the_next_run_removes_what_a_killed_one_left_and_reads_the_same(
    copied: Path, living: subprocess.Popen[str]
) -> None:
    names, first = prefixes(living)
    assert len(claims(copied)) == 2
    kill_all(living)
    left = files_of(names)
    assert {p.name.split("_", 1)[1] for p in left} >= {"locals", "barrier", "barrier_filelock"}
    assert {p for p in left if p.parent == SHM} <= set(left_behind())
    started = time.monotonic()
    again, same = run_to_its_end(copied)
    assert same == first
    assert still_there(left) == {} == still_there(again)
    behind_a_killed_one = time.monotonic() - started
    run_to_its_end(copied)
    behind_an_ended_one = time.monotonic() - started - behind_a_killed_one
    # However busy the machine is: it does not wait for what will never come.
    assert behind_a_killed_one < 3 * behind_an_ended_one + 30


def test_a_look_at_what_is_left_takes_no_claim_from_a_run_that_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = leftovers.claim(tmp_path, separate=False)
    atexit.unregister(dead._give_up)
    dead._give_up()
    dead._file.touch()
    read, looks = leftovers._read, threading.Event()
    numbers: list[int] = []

    def start() -> None:
        assert looks.wait(60)
        with leftovers.start_lock():
            numbers.append(leftovers.claim(tmp_path, separate=False).number)

    def held_up(fd: int) -> dict[str, Any]:
        if not looks.is_set() and os.fstat(fd).st_ino == dead._file.stat().st_ino:
            looks.set()
            starting.join(0.5)
        return read(fd)

    starting = threading.Thread(target=start)
    starting.start()
    monkeypatch.setattr(leftovers, "_read", held_up)
    left_behind()
    starting.join()
    assert numbers == [dead.number]


def test_a_living_run_of_the_same_data_set_is_left_alone(
    copied: Path, living: subprocess.Popen[str], open_loader: Loaders
) -> None:
    names, _ = prefixes(living)
    before = files_of(names)
    loader = open_loader(copied)
    loader.next_step()
    assert loader._samples.prefix not in {int(n) for n in names}
    assert still_there(before) == before
    assert not {p for p in before if p.parent == SHM} & set(left_behind())


def test_the_remains_of_another_data_set_are_left_alone(
    corpus: Path, living: subprocess.Popen[str], open_loader: Loaders
) -> None:
    names, _ = prefixes(living)
    kill_all(living)
    before = files_of(names)
    open_loader(corpus).next_step()
    assert still_there(before) == before


def test_segments_without_a_claim_are_left_alone(
    copied: Path, living: subprocess.Popen[str], open_loader: Loaders
) -> None:
    """As another program that uses streaming would leave them, even for the same folder."""
    names, _ = prefixes(living)
    for claim in claims(copied):
        claim.unlink()
    kill_all(living)
    before = files_of(names)
    open_loader(copied).next_step()
    assert still_there(before) == before
    for path in before:
        path.unlink()


def test_a_cache_folder_can_be_used_again_after_a_kill(texts: Path, tmp_path: Path) -> None:
    """Streaming alone refuses to: `Reused local directory`."""
    out = tmp_path / "zipped"
    build(recipe(texts, compression="zstd"), out, SEQ_LEN)
    process = start(out)
    _, first = prefixes(process)
    other = start(out)
    assert prefixes(other)[1] == first, "two living runs have a folder each"
    kill_all(process)
    assert run_to_its_end(out)[1] == first
    kill_all(other)
    assert {p.name for p in (Path(f"{out}-cache")).glob("*/train/*")} == {"run0", "run1"}
