"""Stored losses of a small real run: what changes them changes the model, knowingly.

The corpus is this repository's LICENSE, the same text on every machine. When a change is meant to
alter the numbers, run this test with TINY_ONN_GOLDEN=write and commit the new file with the reason.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data.build import build
from data.config import BuildConfig
from tests.launcher.tiny import REPOSITORY, finish, rows, tiny_config, tiny_onn

GOLDEN = Path(__file__).parent / "golden_losses.json"
TOLERANCE = 2e-4
"""Relative: machines with other vector units sum in another order."""


@pytest.mark.parametrize("kinds", ["sparse", "dense"])
def test_losses_are_the_stored_ones(kinds: str, tmp_path: Path) -> None:
    recipe = BuildConfig(input=[str(REPOSITORY / "LICENSE")], vocab_size=384, validation_fraction=0)
    build(recipe, tmp_path / "corpus", seq_len=64)
    words = ["--train.steps", "10", "--train.evaluate_every", "0", "--train.sample_every", "0"]
    words += ["--checkpoint.every", "0", "--data.validation_split", "train"]
    # The stored losses are of a model that does not explore; test_experts_router.py has that.
    words += ["--model.ffn.explore_share", "0"]
    if kinds == "dense":
        words += ["--model.attention.kind", "full", "--model.ffn.kind", "dense"]
        words += ["--model.deepembed.kind", "off"]
    path = tiny_config(tmp_path, tmp_path / "corpus")
    code, output = finish(tiny_onn("pretrain", path, *words))
    assert code == 0, output
    found = {k: [r[k] for r in rows(tmp_path / "runs" / "tiny")] for k in ("loss", "grad_norm")}
    stored = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("TINY_ONN_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(stored | {kinds: found}, indent=1) + "\n")
        return
    for name, values in stored[kinds].items():
        assert found[name] == pytest.approx(values, rel=TOLERANCE), name
