"""A whole run on one or two GPUs: trained with every Triton kernel, killed, resumed exactly."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.launcher.tiny import (
    assert_same_run,
    finish,
    held,
    kill_after,
    rows,
    tiny_config,
    tiny_corpus,
    tiny_onn,
)

# Widths that the kernels for GPUs take; the sizes of attention are those of every large model.
WORDS = ["--model.width", "256", "--train.sample_every", "0", "--train.micro_batch", "4"]
ATTENTION = [
    "--model.attention",
    "{heads: 8, groups: 2, head_dim: 64, compress_block: 32, compress_stride: 16, "
    "select_block: 64, selected: 4, window: 128}",
]
EXPERTS = ["--model.ffn.experts", "8", "--model.ffn.expert_hidden", "128"]


@pytest.mark.gpu
@pytest.mark.slow
def test_killed_on_gpus_it_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    processes = min(2, torch.cuda.device_count())
    words = [*WORDS, *ATTENTION, *EXPERTS, "--launch.processes", str(processes)]
    corpus = tiny_corpus(tmp_path)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = tiny_config(tmp_path / "whole", corpus)
    code, output = finish(tiny_onn("pretrain", whole, *words))
    assert code == 0, output
    killed, run = tiny_config(tmp_path / "killed", corpus), tmp_path / "killed" / "runs" / "tiny"
    moments = sorted(random.sample(range(1, 12), 2))
    print(f"{processes} GPUs, killed after the lines of steps", moments)
    for moment in moments:
        kill_after(held("end", tmp_path / "never", "pretrain", killed, *words), run, moment)
    code, output = finish(tiny_onn("pretrain", killed, *words))
    assert code == 0, output
    assert_same_run(run, tmp_path / "whole" / "runs" / "tiny")
    print([round(r["loss"], 4) for r in rows(run)])
