"""The last words of a run are told from its files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.summary import summary, tensorboard_line


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "demo"
    (folder / "checkpoints" / "step-00000100").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000100" / "COMMITTED").touch()
    (folder / "checkpoints" / "step-00000200").mkdir()
    (folder / "config.yaml").write_text(
        f"train: {{steps: 4}}\ndata: {{path: {tmp_path}/corpus, validation_split: held_out}}\n"
    )
    rows = [
        {"step": s, "loss": 3.0 - s / 2, "bits_per_byte": 1.5 - s / 4, "tokens": 1000 * s}
        | {"tokens_per_s": 500.0 if s < 3 else 250.0, "skipped": s == 2}
        for s in range(1, 5)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "validation.jsonl").write_text(
        '{"step": 2, "loss": 2.5, "bits_per_byte": 1.25}\n'
        '{"step": 4, "loss": 2.0, "bits_per_byte": 1.125}\n'
    )
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "index.json").write_text(
        json.dumps({"splits": {"held_out": {"gzip_bits_per_byte": 1.75}}})
    )
    return folder


def test_the_summary_says_everything_a_user_asks_for(run: Path) -> None:
    lines = dict(line.split("  ", 1) for line in summary(run, terminal=False).splitlines())
    told = {name: text.strip() for name, text in lines.items()}
    assert told["steps"] == "4 of 4 (1 skipped)"
    assert told["tokens"] == "4,000"
    # 2,000 tokens at 500 a second, 2,000 at 250.
    assert told["speed"] == "333 tokens/s (0:00:12 in training steps)"
    assert told["training loss"] == "1.0000 nats/token, 0.5000 bits per byte"
    assert told["validation loss"] == "2.0000 nats/token, 1.1250 bits per byte (after step 4)"
    assert told["gzip -9"] == "1.7500 bits per byte of the same held-out text"
    assert told["checkpoints"] == f"{run}/checkpoints (1 kept, newest step-00000100)"
    assert told["TensorBoard"].endswith(f"tensorboard --logdir {run}")


def test_a_terminal_gets_a_table_in_which_no_command_is_cut(run: Path) -> None:
    text = summary(run, terminal=True)
    assert "│" in text and "…" not in text and "333 tokens/s" in text


def test_what_is_not_there_is_said(run: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus" / "index.json").unlink()
    (run / "validation.jsonl").unlink()
    text = summary(run, tmp_path / "corpus", terminal=False)
    assert "none was measured" in text
    assert f"not known: {tmp_path}/corpus/index.json is not on this machine" in text
    (run / "metrics.jsonl").unlink()
    assert "none yet" in summary(run, terminal=False)


def test_a_loss_that_is_no_number_is_said(run: Path) -> None:
    (run / "validation.jsonl").write_text('{"step": 4, "loss": null, "bits_per_byte": null}\n')
    assert "not a finite number (after step 4)" in summary(run, terminal=False)


def test_the_tensorboard_line_is_quoted_for_a_shell() -> None:
    assert tensorboard_line(Path("runs/my run")).endswith("--logdir 'runs/my run'")
