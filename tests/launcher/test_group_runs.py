"""Whole runs whose ranks share sequences: as one rank each, resumed either way, ended together."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.launcher.tiny import (
    finish,
    held,
    rows,
    tiny_config,
    tiny_corpus,
    tiny_onn,
    until_line,
)
from tests.processes import ended

# Two sequences in a pass: which ones depends on the number of ranks, and nothing else does.
OPTIONS = ("--train.stats_every", "6")
GROUP = ("--mesh.group", "2")
# Of the last pass alone, in which other sequences are: they differ most in their Surprise.
BOUNDS = {"moe/experts_per_token": 0.1, "moe/surprise": 0.3, "nsa/selected_distance": 0.1}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def apart(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two ranks with sequences of their own."""
    folder = tmp_path_factory.mktemp("apart")
    code, output = finish(tiny_onn("pretrain", tiny_config(folder, corpus), *OPTIONS))
    assert code == 0, output
    return folder / "runs" / "tiny"


def _assert_same(run: Path, apart: Path) -> None:
    expected, found = rows(apart), rows(run)
    assert [r["step"] for r in found] == list(range(1, 13))
    for a, b in zip(expected, found, strict=True):
        for key in ("tokens", "sample_cursor", "lr"):
            assert a[key] == b[key]
        for key in ("loss", "grad_norm", "bits_per_byte"):
            assert b[key] == pytest.approx(a[key], rel=1e-5), (a["step"], key)
        if "stats" in a:
            for key, bound in BOUNDS.items():
                assert b["stats"][key] == pytest.approx(a["stats"][key], rel=bound), key
    for a, b in zip(*(_validations(r) for r in (apart, run)), strict=True):
        assert (a["step"], a["labels"], a["bytes"]) == (b["step"], b["labels"], b["bytes"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def _validations(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


def test_a_run_that_changes_between_sharing_and_not_is_the_run_that_never_shares(
    apart: Path, corpus: Path, tmp_path: Path
) -> None:
    path, run = tiny_config(tmp_path, corpus), tmp_path / "runs" / "tiny"
    process = held(2, tmp_path / "never", "pretrain", path, *OPTIONS)
    until_line(process, run, 2)
    process.terminate()
    code, output = finish(process)
    assert code == 0 and "stopped" in output, output
    code, output = finish(tiny_onn("pretrain", path, *OPTIONS, *GROUP))
    assert code == 0 and "resuming from step" in output, output
    _assert_same(run, apart)
    code, output = finish(tiny_onn("eval", run))
    assert code == 0, output
    assert json.loads(output.strip().splitlines()[-1])["loss"] == _validations(run)[-1]["loss"]


# The first rank is the one that the others meet at, and that writes the records.
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_killed_rank_ends_those_that_wait_for_it_with_one_message(
    corpus: Path, tmp_path: Path, rank: str
) -> None:
    path, run = tiny_config(tmp_path, corpus), tmp_path / "runs" / "tiny"
    process = tiny_onn("pretrain", path, *OPTIONS, *GROUP, "--train.steps", "100000")
    until_line(process, run, 3)
    ranks = psutil.Process(process.pid).children()
    victim = next(r for r in ranks if r.environ().get("RANK") == rank)
    victim.send_signal(signal.SIGKILL)
    start = time.monotonic()
    code, output = finish(process, timeout=60)
    assert time.monotonic() - start < 60
    assert code == 1 and output.count(f"rank {rank} was killed by SIGKILL") == 1, output
    assert "Traceback" not in output.split(f"rank {rank} was killed")[0], output
    assert all(map(ended, ranks))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mesh.group", "3"), "neither divides the 2 KV groups"),
        (("--mesh.group", "4"), "does not divide the 2 ranks; mesh.group can be 1, 2 here"),
        (("--mesh.group", "2", "--train.global_batch", "3"), "x 1 groups of 2 ranks"),
    ],
)
def test_a_group_that_cannot_be_is_refused_before_ranks_start(
    corpus: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    path = tiny_config(tmp_path, corpus)
    code, output = finish(tiny_onn("pretrain", path, *options))
    assert code == 1 and message in output and "Traceback" not in output, output
    assert not list((tmp_path / "runs").rglob("*-rank*.log"))
