"""What the shell decides around the ranks: where nodes meet, when a job is queued again or ends.

The ranks' part is played by a few lines of shell that write the same files; test_pretrain.py has
the real ones.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, Submission, play, without_slurm

pytestmark = pytest.mark.slurm


def test_nodes_meet_at_the_first_one_on_a_port_of_their_own(submission: Submission) -> None:
    body = 'echo "$NNODES $MASTER_ADDR $MASTER_PORT $TINY_ONN_NODES" >"$run/place$NODE_RANK"; '
    body += '[[ $NODE_RANK == 1 ]] || { sleep 1; touch "$run/DONE"; }'
    play(submission, body).submit("--hold")
    taken = 12000 + submission.job * 67 % 20000
    listens = f"import socket, time; s = socket.create_server(('', {taken})); time.sleep(600)"
    space = f"--net=/run/netns/{submission.cluster.bridge}-n1"
    stranger = subprocess.Popen(["nsenter", space, sys.executable, "-c", listens])
    submission.cluster.run("scontrol", "release", str(submission.job))
    assert submission.wait_finished() == "COMPLETED"
    stranger.kill()
    stranger.wait()
    places = [(submission.run / f"place{node}").read_text().split() for node in (0, 1)]
    assert places[0] == places[1]
    nodes, address, port, *peers = places[0]
    assert (nodes, address, peers) == ("2", "n1", ["n1", "n2"])
    assert int(port) == taken + 1
    logs = sorted(p.name for p in submission.run.glob("logs/*-node*.log"))
    assert logs == [f"job{submission.job}-try0-node{n}.log" for n in (0, 1)]


def test_a_job_without_a_node_list_fails_and_says_so(tmp_path: Path) -> None:
    environment = {**without_slurm(), "SLURM_JOB_ID": "7", "TINY_ONN_PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", ROOT / "slurm" / "pretrain.sh", "--runs", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert "SLURM_JOB_NODELIST is empty" in done.stderr
    assert not list(tmp_path.rglob("*.log"))


def test_a_run_that_keeps_crashing_gives_up_after_its_budget(submission: Submission) -> None:
    # Node 1 dies; node 0 would wait for it forever.
    play(submission, "[[ $NODE_RANK == 0 ]] && exec sleep 300; echo 'rank 1 failed'; exit 1")
    submission.submit(TINY_ONN_CRASHES="1")
    assert submission.wait_finished() == "FAILED"
    assert submission.cluster.job(submission.job)["Restarts"] == "1"
    assert submission.output().count("rank 1 failed") == 2
    assert "crashed at committed step 0, 2 times without progress, and gave up" in (
        submission.output()
    )


def test_progress_gives_the_budget_back(submission: Submission) -> None:
    body = 'if [[ $try == 3 ]]; then touch "$run/DONE"; exit; fi; save $((try + 1)); exit 1'
    play(submission, body).submit(TINY_ONN_CRASHES="1")
    assert submission.wait_finished() == "COMPLETED"
    assert submission.cluster.job(submission.job)["Restarts"] == "3"


def test_a_refused_run_is_not_tried_again(submission: Submission) -> None:
    play(submission, 'echo "another width" >"$run/logs/$TINY_ONN_TRY.refused"; exit 1').submit()
    assert submission.wait_finished() == "FAILED"
    assert "not tried again: another width" in submission.output()


def test_the_signal_before_the_limit_saves_and_queues_again(submission: Submission) -> None:
    body = 'if [[ $try == 1 ]]; then touch "$run/DONE"; exit; fi; touch "$run/up"; '
    body += "until asked; do sleep 0.1; done; save 5"
    play(submission, body).submit()
    submission.wait((submission.run / "up").exists, 30, "the ranks are up")
    submission.cluster.run("scancel", "--batch", "--signal=USR1", str(submission.job))
    assert submission.wait_finished() == "COMPLETED"
    assert "saved step 5 before the time limit; going back to the queue" in submission.output()
    assert "step 5 of" in submission.output()


def test_a_stop_file_ends_the_run_and_keeps_it_from_starting(submission: Submission) -> None:
    play(submission, 'touch "$run/up"; until asked; do sleep 0.1; done; save 3').submit()
    submission.wait((submission.run / "up").exists, 30, "the ranks are up")
    (submission.run / "STOP").touch()
    assert submission.wait_finished() == "COMPLETED"
    assert "stopped at step 3 by" in submission.output()
    submission.submit()
    assert submission.wait_finished() == "COMPLETED"
    assert "STOP asks this run not to run" in submission.output()


def test_a_cancelled_job_saves_and_stays_cancelled(submission: Submission) -> None:
    body = "trap 'save 4; exit' TERM; touch \"$run/up\"; while :; do sleep 0.1; done"
    play(submission, body).submit()
    submission.wait((submission.run / "up").exists, 30, "the ranks are up")
    submission.cluster.run("scancel", str(submission.job))
    assert submission.wait_finished() == "CANCELLED"
    assert submission.committed() == 4
    assert not submission.cluster.run("squeue", "-h").strip()


def test_a_preempted_job_saves_and_goes_on_when_its_turn_comes(submission: Submission) -> None:
    body = 'if [[ $try == 1 ]]; then touch "$run/DONE"; exit; fi; trap "save 4; exit" TERM; '
    body += 'touch "$run/up"; while :; do sleep 0.1; done'
    play(submission, body).submit("--exclusive", "--nodelist=n1,n2")
    submission.wait((submission.run / "up").exists, 30, "the ranks are up")
    urgent = ("--partition=urgent", "--nodelist=n1", "--output=/dev/null", "--wrap=sleep 1")
    submission.cluster.sbatch(*urgent, cwd=submission.folder)
    assert submission.wait_finished() == "COMPLETED"
    # Which step is newest then is a matter of moments: srun does not wait for the ranks.
    assert "cancelled or preempted at committed step" in submission.output()
    assert "try1: step 4 of" in submission.output()
    assert submission.cluster.job(submission.job)["Restarts"] == "1"


def test_a_cluster_that_forbids_requeue_gets_a_successor(submission: Submission) -> None:
    body = '(set -C; echo "$TINY_ONN_TRY" >"$run/first") 2>/dev/null; '
    body += '[[ $(<"$run/first") == "$TINY_ONN_TRY" ]] && exit 1; touch "$run/DONE"'
    play(submission, body).submit("--no-requeue", "--cpus-per-task=2", "--time=5")
    assert submission.wait_finished() == "COMPLETED"
    assert "submitting a successor" in submission.output()
    first = submission.cluster.job(submission.job)
    submission.job += 1
    assert submission.wait_finished() == "COMPLETED"
    assert (submission.run / "DONE").exists()
    second = submission.cluster.job(submission.job)
    for key in ("TimeLimit", "NumNodes", "CPUs/Task", "Partition", "Requeue"):
        assert first[key] == second[key], key


def test_a_run_that_is_done_is_not_run_again(submission: Submission) -> None:
    submission.run.mkdir(parents=True)
    (submission.run / "DONE").touch()
    play(submission, "exit 1").submit()
    assert submission.wait_finished() == "COMPLETED"
    assert "is done" in submission.output()
