"""Folders of a node's own: `$SLURM_TMPDIR` and its like are looked up on each node."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data.config import node_folder
from tests.data.conftest import Loaders


def test_a_variable_of_the_node_is_looked_up_on_the_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for job in ("job.1", "job.2"):
        monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / job))
        assert node_folder("$SLURM_TMPDIR/tiny-onn") == tmp_path / job / "tiny-onn"
        assert node_folder("${SLURM_TMPDIR}/x") == tmp_path / job / "x"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert node_folder("~/cache") == tmp_path / "cache"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    assert node_folder("") == tmp_path / f"tiny-onn-cache-{os.geteuid()}"


def test_a_variable_that_a_node_lacks_is_named_with_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SLURM_TMPDIR", raising=False)
    host = os.uname().nodename
    with pytest.raises(ValueError, match=rf"data\.cache \$SLURM_TMPDIR/x: this node \({host}\)"):
        node_folder("$SLURM_TMPDIR/x")


def test_staged_shards_are_read_from_the_jobs_own_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, corpus: Path, open_loader: Loaders
) -> None:
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path / "job"))
    staged = open_loader(corpus, stage=True, cache="$SLURM_TMPDIR/tiny-onn")
    direct = open_loader(corpus)
    for _ in range(2):
        got, expected = staged.next_step(), direct.next_step()
        assert [b.ids_T.tolist() for b in got] == [b.ids_T.tolist() for b in expected]
    assert list((tmp_path / "job" / "tiny-onn").glob("*/train/run0/*.mds"))
    assert not [p for p in tmp_path.rglob("*") if "$" in p.name]
