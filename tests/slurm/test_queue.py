"""Chains and arrays that share one run, clusters that forbid requeue, and what ends them."""

from __future__ import annotations

import pytest

from tests.slurm.conftest import Submission, play

pytestmark = pytest.mark.slurm

UP = 'touch "$run/up-$TINY_ONN_TRY"; '
# Whether this try is not the first one, the same on all its nodes.
FIRST = '(set -C; echo "$TINY_ONN_TRY" >"$run/first") 2>/dev/null; '
LATER = f'{FIRST} if [[ $(<"$run/first") != "$TINY_ONN_TRY" ]]; then touch "$run/DONE"; exit; fi; '


def restarts(submission: Submission, job: str) -> str:
    words = submission.cluster.run("scontrol", "show", "job", "-o", job).split()
    return dict(w.split("=", 1) for w in words if "=" in w)["Restarts"]


def jobs(submission: Submission) -> list[str]:
    """Every job that the cluster has known since this test began."""
    lines = submission.cluster.run("squeue", "-h", "-r", "-t", "all", "-o", "%i").split()
    return [j for j in lines if int(j.split("_")[0]) >= submission.job]


def test_a_chain_goes_on_job_by_job_and_ends_with_done(submission: Submission) -> None:
    # The first job's limit comes; the cluster forbids requeue, and a link of the chain waits.
    play(submission, f"{LATER} {UP} until asked; do sleep 0.1; done; save 5")
    first = submission.submit("--no-requeue")
    second = submission.submit("--no-requeue", f"--dependency=afterany:{first}")
    third = submission.submit("--no-requeue", f"--dependency=afterany:{second}")
    up = submission.run / f"up-job{first}-try0"
    submission.wait(up.exists, 30, "the first job's ranks are up")
    submission.cluster.run("scancel", "--batch", "--signal=USR1", str(first))
    assert submission.wait_finished() == "COMPLETED"
    assert f"job {second} waits already and goes on" in submission.output(first)
    assert "step 5 of" in submission.output(second)
    assert "is done" in submission.output(third)
    submission.job = first
    assert len(jobs(submission)) == 3


def test_a_stop_file_ends_a_chain(submission: Submission) -> None:
    body = f"{UP} until asked; do sleep 0.1; done; save 3"
    play(submission, body)
    first = submission.submit()
    second = submission.submit(f"--dependency=afterany:{first}")
    submission.wait((submission.run / f"up-job{first}-try0").exists, 30, "the ranks are up")
    (submission.run / "STOP").touch()
    assert submission.wait_finished() == "COMPLETED"
    assert "stopped at step 3" in submission.output(first)
    assert "STOP asks this run not to run" in submission.output(second)


def test_an_array_is_one_run_whose_elements_follow_each_other(submission: Submission) -> None:
    # Of an array's elements the last has the array's own number: it must go back alone.
    body = "saved=$(ls $run/checkpoints 2>/dev/null | wc -l); "
    body += 'if ((saved == 2)); then touch "$run/DONE"; exit; fi; save $((saved + 1)); exit 1'
    play(submission, body).submit("--nodes=1", "--array=1-2%1")
    array = submission.job
    elements = [f"{array}_1", f"{array}_2"]
    submission.wait((submission.run / "DONE").exists, 60, "the run is done")
    submission.wait(
        lambda: not submission.cluster.run("squeue", "-h").strip(), 60, "all elements end"
    )
    assert sum(int(restarts(submission, e)) for e in elements) == 2
    assert len(jobs(submission)) == 2


def test_an_array_trains_a_run_each_where_the_name_has_its_number(submission: Submission) -> None:
    body = 'echo "$SLURM_ARRAY_TASK_ID" >"$run/element"; touch "$run/DONE"'
    play(submission, body).submit("--array=3-4", "--nodes=1", overrides=("--name", "lr-%a"))
    done = [submission.run.with_name(f"lr-{i}") / "DONE" for i in (3, 4)]
    submission.wait(lambda: all(d.exists() for d in done), 60, "both runs are done")
    assert [(d.parent / "element").read_text().strip() for d in done] == ["3", "4"]


def test_a_preempted_job_that_may_not_be_requeued_has_one_successor(
    submission: Submission,
) -> None:
    play(submission, f'{LATER} trap "save 4; exit" TERM; {UP} while :; do sleep 0.1; done')
    first = submission.submit("--no-requeue", "--exclusive", "--nodelist=n1,n2")
    submission.wait((submission.run / f"up-job{first}-try0").exists, 30, "the ranks are up")
    urgent = ("--partition=urgent", "--nodelist=n1", "--output=/dev/null", "--wrap=sleep 1")
    urgent_job = submission.cluster.sbatch(*urgent, cwd=submission.folder)
    submission.wait((submission.run / "DONE").exists, 60, "the successor ends the run")
    assert submission.cluster.job(first)["JobState"] == "PREEMPTED"
    assert len(jobs(submission)) == 3
    submission.job = urgent_job + 1
    assert submission.wait_finished() == "COMPLETED"
    assert "step 4 of" in submission.output()
