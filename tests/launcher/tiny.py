"""A corpus and a configuration small enough to train in seconds, for tests of whole runs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import psutil
from safetensors.torch import load_file

from data.build import build
from data.config import BuildConfig

REPOSITORY = Path(__file__).resolve().parents[2]
EXACT = ("loss", "grad_norm", "lr", "tokens", "sample_cursor", "bits_per_byte")

CONFIG = """\
name: tiny
runs: {runs}
data: {{path: {corpus}, seq_len: 64}}
model:
  width: 32
  layers: 2
  attention: {{heads: 4, groups: 2, head_dim: 16, compress_block: 8, compress_stride: 4,
              select_block: 16, selected: 3, window: 24}}
  ffn: {{experts: 4, expert_hidden: 16, target_experts: 2.0, max_experts: 3, explore_share: 0.1}}
  deepembed: {{kind: output}}
engine:
  optimizer: {{lr: 3.0e-3}}
  schedule: {{warmup: 3}}
train: {{steps: 12, global_batch: 8, micro_batch: 2, evaluate_every: 5, evaluate_sequences: 8,
        stats_every: 3, sample_every: 6, sample_tokens: 4}}
checkpoint: {{every: 4, keep_last: 3}}
launch: {{processes: 2, threads: 1, step_timeout: 120, first_step_timeout: 300}}
"""


def tiny_corpus(folder: Path) -> Path:
    """Build a corpus of a few modules of the standard library."""
    library = Path(os.__file__).parent
    names = ("argparse", "ast", "cmd", "code", "csv", "enum", "heapq", "queue", "shlex", "types")
    sources = folder / "sources"
    sources.mkdir(parents=True)
    for name in names:
        (sources / f"{name}.py").write_bytes((library / f"{name}.py").read_bytes())
    config = BuildConfig(
        input=[str(sources)], vocab_size=512, tokenizer_sample_mb=1, validation_fraction=0.3
    )
    build(config, folder / "corpus", seq_len=64)
    return folder / "corpus"


def tiny_config(folder: Path, corpus: Path) -> Path:
    """Write the configuration of a tiny run whose runs are in `folder`/runs."""
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(runs=folder / "runs", corpus=corpus))
    return path


def tiny_onn(*words: str | Path, **environment: str) -> subprocess.Popen[str]:
    """Start `python -m launcher WORDS` with its output in one pipe."""
    return _start("launcher", *words, **environment)


def held(step: int | Literal["end"], gate: Path, *words: str | Path) -> subprocess.Popen[str]:
    """Start the same with ranks that wait behind a step, see `tests.launcher.held`."""
    return _start("tests.launcher.held", str(step), gate, *words)


def _start(module: str, *words: str | Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 480) -> tuple[int, str]:
    """Wait for the end; returns the exit code and the output."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, output


def rows(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl; a torn last one is left out."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def until_line(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Wait until a run has the line of a step."""
    deadline = time.monotonic() + 400
    while len(rows(run)) < step:
        assert process.poll() is None, finish(process)[1]
        assert time.monotonic() < deadline, f"no line of step {step} in {run}"
        time.sleep(0.01)


def kill_after(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Kill a run and all its processes with SIGKILL some moment after the line of a step."""
    until_line(process, run, step)
    time.sleep(random.random() * 0.3)
    everyone = [process, *psutil.Process(process.pid).children(recursive=True)]
    random.shuffle(everyone)
    for victim in everyone:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    finish(process)


def final_tensors(run: Path) -> dict[str, dict[str, Any]]:
    """Return every tensor of a run's last checkpoint, by file and name."""
    newest = max((run / "checkpoints").glob("step-*"))
    return {f.name: load_file(f) for f in sorted(newest.glob("*.safetensors"))}


def assert_same_run(run: Path, reference: Path, steps: int = 12) -> None:
    """Assert that a run has each step once, and losses and last checkpoint of another, bitwise."""
    expected, found = rows(reference), rows(run)
    assert [r["step"] for r in found] == list(range(1, steps + 1))
    for a, b in zip(expected, found, strict=True):
        assert {k: a[k] for k in EXACT} == {k: b[k] for k in EXACT}
    assert (run / "validation.jsonl").read_text() == (reference / "validation.jsonl").read_text()
    ours, theirs = final_tensors(run), final_tensors(reference)
    assert ours.keys() == theirs.keys() and ours
    for name, tensors in theirs.items():
        for key, tensor in tensors.items():
            assert tensor.equal(ours[name][key]), (name, key)
