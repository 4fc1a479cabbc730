"""Bad steps are not applied, a run goes back behind many of them, and kills change none of it."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from data.build import build
from data.config import BuildConfig
from launcher.spikes import SpikeConfig, SpikeWatch
from tests.launcher.tiny import REPOSITORY, rows, tiny_config

STEPS = 32
EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "sample_cursor", "skipped", "event")


def watch(**changes: Any) -> SpikeWatch:
    """A watch that has seen 40 ordinary steps."""
    w = SpikeWatch(SpikeConfig(**changes))
    for step in range(1, 41):
        assert w.accept(step, 3 + 0.02 * math.sin(step), 0.5 + 0.1 * math.cos(step))
    return w


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (math.nan, 0.5, "loss is not finite"),
        (3.0, math.inf, "gradient norm is not finite"),
        (4.0, 0.5, "loss 4 is .* sigma above 3.*"),
        (3.0, 30.0, r"gradient norm 30 is .* times 0\.4996"),
        (3.2, 3.0, ""),
        (1.0, 0.0, ""),
    ],
)
def test_only_what_is_far_above_the_runs_own_steps_is_a_spike(
    loss: float, norm: float, reason: str
) -> None:
    w = watch()
    assert w.accept(41, loss, norm) == (not reason)
    assert re.fullmatch(reason, w.reason), w.reason
    assert w.run_of_spikes == []


def test_nothing_finite_is_an_outlier_at_the_start_or_when_switched_off() -> None:
    w = SpikeWatch(SpikeConfig())
    assert w.accept(1, 900.0, 1e9)
    assert not w.accept(2, math.nan, 1.0)
    w = watch(loss_sigma=0, norm_factor=0)
    assert w.accept(41, 900.0, 1e9)


def test_spikes_near_each_other_are_a_run_and_spikes_stay_out_of_the_statistics() -> None:
    w = watch(patience=3, span=5)
    for step, loss in enumerate([9.0, 3.0, 9.0, 3.0, 3.0, 9.0], 41):
        w.accept(step, loss, 0.5)
        assert w.run_of_spikes == []
    w.accept(47, 9.0, 0.5)
    assert w.run_of_spikes == [43, 46, 47]
    state = json.loads(json.dumps(w.state_dict()))
    assert max(state["losses"]) < 4
    again = SpikeWatch(w.cfg)
    again.load_state_dict(state)
    assert again.state_dict() == w.state_dict()
    assert [again.accept(48, x, 0.5) for x in (3.3, 9.0)] == [True, False]


@pytest.mark.parametrize(
    ("key", "value"),
    [("patience", 0), ("patience", 11), ("window", 1), ("norm_factor", 0.5), ("loss_sigma", -1)],
)
def test_impossible_settings_are_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"spikes.{key} {value}"):
        SpikeConfig(**{key: value})


def poisoned_corpus(folder: Path) -> Path:
    """Regular text, then about three steps' worth of noise, then regular text."""
    sources = folder / "sources"
    sources.mkdir(parents=True)
    generator = random.Random(7)
    words = ["sun", "moon", "tide", "rain", "snow", "wind", "leaf", "root", "seed", "bark"]

    def line() -> str:
        first = generator.randrange(10)
        return " ".join(words[(first + i) % 10] for i in range(10)) + "\n"

    characters = [chr(c) for c in range(33, 127)]
    (sources / "1.txt").write_text("".join(line() for _ in range(1100)))
    (sources / "2.txt").write_text("".join(generator.choice(characters) for _ in range(2000)))
    (sources / "3.txt").write_text("".join(line() for _ in range(1200)))
    recipe = BuildConfig(input=[str(sources)], vocab_size=420, validation_fraction=0)
    build(recipe, folder / "corpus", seq_len=64)
    return folder / "corpus"


def run_config(folder: Path, corpus: Path, **changes: Any) -> Path:
    """A run of one rank over the corpus in its own order."""
    folder.mkdir(parents=True, exist_ok=True)
    path = tiny_config(folder, corpus)
    tree = yaml.safe_load(path.read_text())
    tree["data"] |= {"shuffle": False, "validation_split": "train"}
    tree["train"] |= {
        "steps": STEPS,
        "micro_batch": 8,
        "evaluate_every": 0,
        "sample_every": 0,
        "stats_every": 0,
    }
    tree["launch"]["processes"] = 1
    tree["checkpoint"] = {"every": 4, "keep_last": 9}
    tree["spikes"] = {"window": 8, "patience": 3}
    tree["engine"]["optimizer"]["lr"] = 0.02
    for key, value in changes.items():
        tree[key] |= value
    path.write_text(yaml.safe_dump(tree))
    return path


def deadly(path: Path, point: str = "none") -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.launcher.deadly_worker", point, str(path)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return poisoned_corpus(tmp_path_factory.mktemp("poisoned"))


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_poisoned_data_is_skipped_and_being_killed_while_going_back_changes_nothing(
    corpus: Path, tmp_path: Path
) -> None:
    path = run_config(tmp_path / "whole", corpus)
    code, output = deadly(path)
    assert code == 0, output
    whole = path.parent / "runs" / "tiny"
    found = rows(whole)
    assert [r["step"] for r in found] == list(range(1, STEPS + 1))
    (window,) = json.loads((whole / "skipped_data.json").read_text())
    begin, end, step = window["begin"], window["end"], window["step"]
    assert begin == step <= window["spikes"][0] - 1 and end == window["from_step"]
    assert f"back to step {step}, on with the data behind step {end}" in output
    # Its samples: known by id, and none of them in what was trained on.
    spiked = {i for e in events(whole) if e["kind"] == "skipped" for i in e["sample_ids"]}
    assert spiked >= set(range(8 * (end - 3), 8 * end))
    assert all(len(e["sample_ids"]) == 8 for e in events(whole) if e["kind"] == "skipped")
    rolled = [r for r in found if r.get("event", {}).get("kind") == "rollback"]
    behind = [r for r in found if "behind" in r.get("event", {})]
    assert [r["step"] for r in rolled + behind] == [step + 1]
    assert [r["sample_cursor"] for r in found[step - 1 : step + 1]] == [8 * begin, 8 * (end + 1)]
    # Noise alone has a loss of 6. One step may share its batch with the end of it, and is let in.
    *clean, mixed = sorted(r["loss"] for r in found[step - 1 :] if not r["skipped"])
    assert max(clean) < 3
    assert mixed < 4
    assert list((whole / "tensorboard").iterdir())

    path = run_config(tmp_path / "killed", corpus)
    killed = path.parent / "runs" / "tiny"
    for point in ("after discard", "before window", "after window"):
        code, output = deadly(path, point)
        assert code == -signal.SIGKILL, (point, output)
    code, output = deadly(path)
    assert code == 0, output
    for a, b in zip(found, rows(killed), strict=True):
        assert {k: a.get(k) for k in EXACT} == {k: b.get(k) for k in EXACT}
    for name in ("dense", "table-deepembed"):
        file = f"checkpoints/step-{STEPS:08d}/rank-00000.{name}.safetensors"
        ours, theirs = load_file(killed / file), load_file(whole / file)
        assert all(tensor.equal(ours[key]) for key, tensor in theirs.items())


@pytest.mark.slow
def test_learning_rate_that_explodes_ends_with_a_checkpoint_and_the_remedy(
    corpus: Path, tmp_path: Path
) -> None:
    # Large enough that no number of it stays finite: a smaller one may end in a model that says the
    # same whatever it reads, whose gradient is zero.
    engine = {"optimizer": {"lr": 1e4, "clip": 0.0}, "schedule": {"warmup": STEPS}}
    path = run_config(tmp_path, corpus, engine=engine)
    code, output = deadly(path)
    run = path.parent / "runs" / "tiny"
    assert code == 1 and "Traceback" not in output, output
    assert "checkpoint of step" in output and "other spikes.* settings" in output
    last = rows(run)[-1]["step"]
    assert events(run)[-1]["kind"] == "gave_up" and events(run)[-1]["step"] == last
    assert (run / "checkpoints" / f"step-{last:08d}" / "COMMITTED").exists()
    assert list((run / "logs").glob("*.refused"))
    assert not (run / "DONE").exists()
