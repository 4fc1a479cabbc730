"""A killed run's shared memory goes when the data set is opened again; nobody else's is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.build import build
from data.leftovers import SHM, left_behind
from tests.data.conftest import SEQ_LEN, Loaders, recipe

SCRIPT = """
    import sys
    from data.config import DataConfig
    from data.loader import PackedLoader
    from data.leftovers import left_behind
    path, mode = sys.argv[1:3]
    config = DataConfig(path=path, seq_len={seq_len}, cache=path + "-cache")
    loader = PackedLoader(config, micro_batch=2, accumulation=2, rank=0, world=1)
    first = loader.next_step()[0].ids_T.sum().item()
    print(loader._samples.prefix, loader._held_out.prefix, first, flush=True)
    if mode == "stay":
        sys.stdin.read()
"""


def start(path: Path, mode: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT).format(seq_len=SEQ_LEN), str(path), mode],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def prefixes(process: subprocess.Popen[str]) -> tuple[list[str], int]:
    assert process.stdout is not None
    train, held_out, first = (int(n) for n in process.stdout.readline().split())
    return [f"{train:06}", f"{held_out:06}"], first


def remains(names: list[str]) -> list[Path]:
    places = (SHM, Path(tempfile.gettempdir()))
    return [p for n in names for place in places for p in place.glob(f"{n}_*")]


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill the run with its helper that would otherwise clear its shared memory away."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_to_its_end(path: Path) -> tuple[list[str], int]:
    process = start(path, "end")
    result = prefixes(process)
    assert process.wait(60) == 0
    return result


@pytest.fixture
def living(copied: Path) -> Iterator[subprocess.Popen[str]]:
    """A run of the copied corpus that stays alive."""
    process = start(copied, "stay")
    yield process
    kill_all(process)


def claims() -> set[Path]:
    return set(SHM.glob(f"tiny-onn.{os.geteuid()}.*.*"))


def test_a_run_that_ends_leaves_nothing(copied: Path) -> None:
    before = claims()
    names, _ = run_to_its_end(copied)
    assert remains(names) == []
    assert claims() <= before


def test_the_next_run_removes_what_a_killed_one_left_and_reads_the_same(
    copied: Path, living: subprocess.Popen[str]
) -> None:
    names, first = prefixes(living)
    kill_all(living)
    left = remains(names)
    assert {p.name.split("_", 1)[1] for p in left} >= {"locals", "barrier", "barrier_filelock"}
    assert {p for p in left if p.parent == SHM} <= set(left_behind())
    started = time.monotonic()
    again, same = run_to_its_end(copied)
    assert same == first
    assert remains(names) == [] == remains(again)
    assert time.monotonic() - started < 60


def test_a_living_run_of_the_same_data_set_is_left_alone(
    copied: Path, living: subprocess.Popen[str], open_loader: Loaders
) -> None:
    names, _ = prefixes(living)
    before = sorted(remains(names))
    loader = open_loader(copied)
    loader.next_step()
    assert loader._samples.prefix not in {int(n) for n in names}
    assert sorted(remains(names)) == before
    assert not {p for p in before if p.parent == SHM} & set(left_behind())


def test_the_remains_of_another_data_set_are_left_alone(
    corpus: Path, living: subprocess.Popen[str], open_loader: Loaders
) -> None:
    names, _ = prefixes(living)
    kill_all(living)
    before = sorted(remains(names))
    open_loader(corpus).next_step()
    assert sorted(remains(names)) == before


def test_segments_without_a_claim_are_left_alone(
    copied: Path, living: subprocess.Popen[str], open_loader: Loaders
) -> None:
    """As another program that uses streaming would leave them, even for the same folder."""
    names, _ = prefixes(living)
    mine = set(living.args[-2:-1]) if isinstance(living.args, list) else set()
    assert mine == {str(copied)}
    for claim in claims():
        if f'"prefix": {int(names[0])},' in claim.read_text():
            claim.unlink()
    kill_all(living)
    before = sorted(remains(names[:1]))
    open_loader(copied).next_step()
    assert sorted(remains(names[:1])) == before
    for path in before:
        path.unlink()


def test_a_cache_folder_can_be_used_again_after_a_kill(texts: Path, tmp_path: Path) -> None:
    """Streaming alone refuses to: `Reused local directory`."""
    out = tmp_path / "zipped"
    build(recipe(texts, compression="zstd"), out, SEQ_LEN)
    process = start(out, "stay")
    _, first = prefixes(process)
    other = start(out, "stay")
    assert prefixes(other)[1] == first, "two living runs have a folder each"
    kill_all(process)
    assert run_to_its_end(out)[1] == first
    kill_all(other)
    assert {p.name for p in (Path(f"{out}-cache")).glob("*/train/*")} == {"run0", "run1"}
