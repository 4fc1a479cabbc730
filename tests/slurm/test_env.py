"""The environment is installed once, again when it is described anew, and never by two at once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, without_slurm

# Stands in for python3 and for the environment's own python: it makes environments of itself and
# notes what pip was asked for.
STAND_IN = """\
#!/usr/bin/env bash
case "$1 $2" in
"-c "*print*) echo "$0" ;;
"-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pip")
  [[ $3 != --version ]] || exit 0
  echo "${*:3}" >>"$PIP_CALLS"
  sleep "${PIP_SECONDS:-0.3}"
  if [[ -e $PIP_CALLS.fail ]]; then echo no space; exit 1; fi ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with nothing but what env.sh reads, and a python3 that installs nothing."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    program(tmp_path, "python3", STAND_IN)
    program(tmp_path, "nvidia-smi", "#!/bin/sh\nexit 9\n")
    return tmp_path


def program(checkout: Path, name: str, text: str) -> Path:
    path = checkout / "bin" / name
    path.write_text(text)
    path.chmod(0o755)
    return path


def env_sh(checkout: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", "slurm/env.sh", *arguments],
        cwd=checkout,
        env={
            **without_slurm(),
            "PATH": f"{checkout}/bin:{os.environ['PATH']}",
            "PIP_CALLS": str(checkout / "calls"),
            **environment,
        },
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=30)
    return process.returncode, err


def calls(checkout: Path) -> list[str]:
    return (checkout / "calls").read_text().splitlines()


def test_one_resolution_installs_everything_and_a_second_call_nothing(checkout: Path) -> None:
    code, err = finished(env_sh(checkout))
    assert code == 0, err
    assert "installing into" in err
    assert finished(env_sh(checkout)) == (0, "")
    assert calls(checkout) == ["install --no-input --no-compile -c constraints.txt -e ."]


def test_the_tests_extra_is_added_once_and_stays(checkout: Path) -> None:
    for arguments in ((), ("--test",), ("--test",), ()):
        assert finished(env_sh(checkout, *arguments))[0] == 0
    with (checkout / "constraints.txt").open("a") as f:
        f.write("# changed\n")
    assert finished(env_sh(checkout))[0] == 0
    assert [c.rpartition(" ")[2] for c in calls(checkout)] == [".", ".[test]", ".[test]"]


def test_several_jobs_at_once_install_once(checkout: Path) -> None:
    ends = [finished(p) for p in [env_sh(checkout) for _ in range(4)]]
    assert [code for code, _ in ends] == [0, 0, 0, 0]
    assert len(calls(checkout)) == 1


def test_a_failed_installation_shows_why_and_is_tried_again(checkout: Path) -> None:
    (checkout / "calls.fail").touch()
    code, err = finished(env_sh(checkout))
    assert code == 1
    assert "no space" in err
    (checkout / "calls.fail").unlink()
    assert finished(env_sh(checkout))[0] == 0
    assert len(calls(checkout)) == 2


def test_a_gpu_adds_its_extra(checkout: Path) -> None:
    program(checkout, "nvidia-smi", "#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    assert finished(env_sh(checkout, "--test"))[0] == 0
    assert calls(checkout)[0].endswith("-e .[gpu,test]")


def test_an_own_interpreter_is_used_as_it_is(checkout: Path) -> None:
    assert finished(env_sh(checkout, TINY_ONN_PYTHON=sys.executable)) == (0, "")
    assert not (checkout / "calls").exists()


def test_who_wants_no_bytecode_beside_the_sources_has_it_in_the_cache(checkout: Path) -> None:
    (checkout / "module.py").write_text("")
    code = 'source slurm/env.sh --; "$PYTHON" -c "import module"'
    environment = {**without_slurm(), "TINY_ONN_PYTHON": sys.executable, "PYTHONPATH": "."}
    environment.pop("PYTHONPYCACHEPREFIX", None)
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    subprocess.run(["bash", "-c", code], cwd=checkout, env=environment, check=True, timeout=60)
    (compiled,) = checkout.rglob("module.*.pyc")
    assert compiled.is_relative_to(checkout / ".cache/bytecode")


def test_an_own_interpreter_without_the_packages_is_refused(checkout: Path) -> None:
    text = f'#!/bin/sh\nexec {sys.base_prefix}/bin/python3 -IS "$@"\n'
    isolated = program(checkout, "isolated", text)
    code, err = finished(env_sh(checkout, TINY_ONN_PYTHON=str(isolated)))
    assert code == 1
    assert "lacks packages" in err
    assert "'deepspeed==" in err


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--tests"], {}, "unknown argument '--tests'"),
        ([], {"TINY_ONN_PYTHON": "no-such-python"}, "no such program"),
    ],
)
def test_what_cannot_be_is_refused(
    checkout: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    code, err = finished(env_sh(checkout, *arguments, **environment))
    assert code != 0
    assert message in err


@pytest.fixture
def scripts(checkout: Path, tmp_path: Path) -> Path:
    """The checkout under a name with a space, as a job sees it; Slurm's programs note calls."""
    place = tmp_path / "my code"
    place.mkdir()
    for name in ("slurm", "bin", "pyproject.toml", "constraints.txt"):
        (checkout / name).rename(place / name)
    (place / "launcher").mkdir()
    (place / "launcher" / "__main__.py").touch()
    (place / "runs" / "trial").mkdir(parents=True)
    (place / "runs" / "trial" / "config.yaml").touch()
    # Slurm runs a copy of the script, and shows the command with its arguments.
    spool = tmp_path / "spool"
    spool.mkdir()
    for name in ("pretrain", "eval"):
        shutil.copy(place / "slurm" / f"{name}.sh", spool / f"{name}.sh")
    show = f"echo '   Command={place}/slurm/'$SCRIPT'.sh runs/trial'"
    note = f'echo "$*" >>"{tmp_path}/asked"'
    program(place, "scontrol", f"#!/bin/bash\n[[ $1 == show ]] && {show} || {note}\n")
    for name in ("srun", "squeue"):
        program(place, name, f'#!/bin/bash\necho "{name} $*" >>"{tmp_path}/asked"\n')
    return place


def job(scripts: Path, script: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", scripts.parent / "spool" / f"{script}.sh", *arguments],
        cwd=scripts.parent,
        env={
            **without_slurm(),
            "PATH": f"{scripts}/bin:{os.environ['PATH']}",
            "PIP_CALLS": str(scripts / "calls"),
            "PIP_SECONDS": "20",
            "SLURM_JOB_ID": "7",
            "SLURM_SUBMIT_DIR": "/",
            "ENVIRONMENT": "BATCH",
            "SCRIPT": script,
            **more,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def until_installing(scripts: Path) -> None:
    deadline = time.monotonic() + 20
    while not (scripts / "calls").exists() and time.monotonic() < deadline:
        time.sleep(0.05)


@pytest.mark.parametrize("script", ["pretrain", "eval"])
@pytest.mark.parametrize(("tries", "code"), [("0", 0), ("3", 1)])
def test_a_time_limit_that_comes_during_the_first_installation_queues_the_job_again(
    scripts: Path, script: str, tries: str, code: int
) -> None:
    started = job(scripts, script, f"{scripts}/runs/trial", SLURM_RESTART_COUNT=tries)
    until_installing(scripts)
    start = time.monotonic()
    started.send_signal(signal.SIGUSR1)
    try:
        # The installation goes on in the background; Slurm ends it with the job.
        assert started.wait(15) == code
    finally:
        os.killpg(started.pid, signal.SIGKILL)
    assert time.monotonic() - start < 15
    assert started.stdout is not None
    said = started.stdout.read()
    asked = scripts.parent / "asked"
    if code == 0:
        assert asked.read_text() == "requeue 7\n", said
        assert "the time limit came before the ranks were started; going back" in said
    else:
        assert not asked.exists()
        assert "after 3 tries, and gave up: ask for more --time" in said


@pytest.mark.parametrize("verb", ["pretrain", "eval"])
def test_inside_a_step_of_a_job_no_further_step_is_started(scripts: Path, verb: str) -> None:
    program(scripts, "own", '#!/bin/bash\n[[ $1 == -m ]] && echo "ran $*"; exit 0\n')
    own = {"TINY_ONN_PYTHON": f"{scripts}/bin/own", "SLURM_STEP_ID": "0", "ENVIRONMENT": ""}
    out, _ = job(scripts, verb, f"{scripts}/runs/trial", **own).communicate(timeout=30)
    assert f"ran -m launcher {verb} {scripts}/runs/trial" in out
    assert not (scripts.parent / "asked").exists()
