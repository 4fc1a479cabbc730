"""A test that did not run must not look like one that passed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def outcome(folder: Path, body: str, *options: str) -> tuple[int, str]:
    (folder / "test_it.py").write_text(f"import pytest\n{body}\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml"),
         "--rootdir", str(folder), *options, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )  # fmt: skip
    return done.returncode, done.stdout


SKIP = "def test_a(): pytest.skip('no disk')\ndef test_b(): pass"


@pytest.mark.parametrize("options", [(), ("-n", "1")])
def test_a_skip_fails_the_run_and_is_listed(tmp_path: Path, options: tuple[str, ...]) -> None:
    assert outcome(tmp_path, SKIP, *options)[0] == 0
    code, text = outcome(tmp_path, SKIP, "--no-skips", *options)
    assert code == 1
    assert "test_it.py::test_a: Skipped: no disk" in text


def test_a_skipped_file_fails_the_run(tmp_path: Path) -> None:
    code, text = outcome(tmp_path, "pytest.importorskip('no_such_package')", "--no-skips")
    assert code != 0
    assert "no_such_package" in text


def test_a_missing_gpu_and_an_expected_failure_are_no_skips(tmp_path: Path) -> None:
    body = (
        "@pytest.mark.gpu\ndef test_a(): import torch; assert torch.cuda.is_available()\n"
        "@pytest.mark.xfail\ndef test_b(): assert False"
    )
    assert outcome(tmp_path, body, "--no-skips")[0] == 0
