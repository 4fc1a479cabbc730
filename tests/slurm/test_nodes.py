"""Nodes that are lost, nodes that are unfit, and nodes where everything runs in a container."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.conftest import Submission, play

pytestmark = pytest.mark.slurm

WAITS = 'if [[ -e $run/lost ]]; then touch "$run/DONE"; exit; fi; touch "$run/up-$NODE_RANK"; '
WAITS += "while :; do sleep 0.1; done"


@pytest.fixture
def mended(submission: Submission) -> Iterator[Submission]:
    """A submission after whose test every node works again."""
    yield submission
    cluster = submission.cluster
    for node in ("n2", "n4"):
        cluster.plug(node)
        cluster.crash_node(node)
        cluster.start_node(node)
    cluster.wait_all_idle()


def test_lost_nodes_cost_one_try_each(mended: Submission) -> None:
    """A pulled cable and a power cut at once, under four kinds of jobs."""
    cluster = mended.cluster
    options = {
        "peer-lost": ("--nodelist=n1,n2",),
        "peer-lost-no-requeue": ("--nodelist=n1,n2", "--no-requeue"),
        "batch-host-lost": ("--nodes=1", "--nodelist=n2"),
        "power-cut": ("--nodelist=n3,n4",),
    }
    folders, numbers = {}, {}
    for name, words in options.items():
        mended.run = mended.folder / "runs" / name
        play(mended, WAITS)
        numbers[name] = mended.submit("--cpus-per-task=1", *words)
        folders[name] = mended.run
    last = {"batch-host-lost": "up-0"}
    mended.wait(
        lambda: all((folders[n] / last.get(n, "up-1")).exists() for n in options), 60, "all are up"
    )
    for folder in folders.values():
        (folder / "lost").touch()
    cluster.unplug("n2")
    cluster.crash_node("n4")
    # A new try may go anywhere; its list of nodes was only for this test's first one.
    gone = [n for n in options if n != "peer-lost-no-requeue"]
    mended.wait(
        lambda: all(cluster.job(numbers[n])["JobState"] == "PENDING" for n in gone),
        90,
        "Slurm gives up the lost nodes",
    )
    for name in gone:
        cluster.run("scontrol", "update", f"JobId={numbers[name]}", "ReqNodeList=")
    mended.wait(lambda: all((f / "DONE").exists() for f in folders.values()), 90, "all are done")
    for name in gone:
        assert cluster.job(numbers[name])["Restarts"] == "1", name
    output = mended.output(numbers["peer-lost-no-requeue"])
    assert cluster.job(numbers["peer-lost-no-requeue"])["JobState"] == "NODE_FAIL"
    assert "goes on" in output


def test_an_unfit_node_is_excluded_and_the_others_train(
    submission: Submission, tmp_path: Path
) -> None:
    # On n2 another version of a package comes first, and the scratch disk is full.
    other = tmp_path / "other" / "safetensors-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 9.9\n")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    submission.cluster.inside("n2", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(scratch))
    play(submission, 'touch "$run/DONE"')
    script = submission.python.read_text()
    switch = f"[[ ${{NODE_NAME:-}} != n2 ]] || export PYTHONPATH={tmp_path}/other\n"
    submission.python.write_text(script.replace("\n", f"\n{switch}", 1))
    stage = ("--data.stage", "true", "--data.cache", str(scratch), "--launch.free_gb", "0.1")
    submission.submit("--nodes=3", overrides=stage, TINY_ONN_PREFLIGHT="1")
    assert submission.wait_finished(240) == "COMPLETED", submission.output()
    output = submission.output()
    assert "starting on 3 node(s): n1 n2 n3" in output
    assert "pre-flight: node n2: safetensors is 9.9, on the others" in output
    assert f"pre-flight: node n2: {scratch} cannot be written: No space left on device" in output
    assert "node(s) n2 are excluded from the next try" in output
    assert "starting on 3 node(s): n1 n3 n4" in output
    assert "pre-flight: 3 node(s) are fit" in output
    assert "all-reduce of 4 MiB over all nodes: gloo" in output
    reports = [json.loads(p.read_text()) for p in submission.run.glob("logs/*try1-preflight*.json")]
    assert {r["name"]: set(r["links"]) for r in reports} == {
        "n1": {"1"}, "n3": {"0", "2"}, "n4": {"1"}
    }  # fmt: skip
    for report in reports:
        assert set(report["links"].values()) == {""}
        assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    submission.cluster.inside("n2", "umount", str(scratch))


def test_a_gpu_that_does_not_answer_is_found_before_the_ranks_start(
    submission: Submission,
) -> None:
    play(submission, 'touch "$run/DONE"')
    submission.submit("--nodes=1", "--gres=gpu:1", TINY_ONN_PREFLIGHT="1", TINY_ONN_CRASHES="0")
    assert submission.wait_finished(120) == "FAILED"
    assert "pre-flight: node n1: 1 GPU(s) were asked for, GPU 0 does not answer" in (
        submission.output()
    )
    assert "the pre-flight found node(s) n1 unfit at committed step 0" in submission.output()
    assert not (submission.run / "DONE").exists()


CONTAINER_PLUGIN = """\
#!/usr/bin/env bash
# Stands in for srun with a container plugin: notes what it was asked for and says where it runs.
words=()
for word in "$@"; do
  case $word in
  --container-*) echo "$word" >>"{folder}/container" ;;
  *) words+=("$word") ;;
  esac
done
IN_CONTAINER=yes exec /usr/bin/srun "${{words[@]}}"
"""


def test_in_a_container_every_python_runs_there(submission: Submission, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "srun"
    program.parent.mkdir()
    program.write_text(CONTAINER_PLUGIN.format(folder=tmp_path))
    program.chmod(0o755)
    play(submission, 'echo "$IN_CONTAINER" >"$run/where"; touch "$run/DONE"')
    inside = tmp_path / "container-python"
    text = submission.python.read_text()
    outside = f"[[ ${{IN_CONTAINER:-}} == yes ]] || {{ touch {tmp_path}/outside; exit 1; }}\n"
    inside.write_text(text.replace("\n", f"\n{outside}", 1))
    inside.chmod(0o755)
    submission.submit(
        PATH=f"{program.parent}:{os.environ['PATH']}",
        TINY_ONN_PYTHON=str(inside),
        TINY_ONN_CONTAINER="registry/tiny-onn:1",
        TINY_ONN_MOUNTS="/data:/data",
    )
    assert submission.wait_finished() == "COMPLETED", submission.output()
    assert (submission.run / "where").read_text() == "yes\n"
    assert not (tmp_path / "outside").exists()
    asked = (tmp_path / "container").read_text().splitlines()
    assert set(asked[:3]) == set(asked)
    assert "--container-image=registry/tiny-onn:1" in asked
    assert any(w.startswith("--container-mounts=") and w.endswith(",/data:/data") for w in asked)
