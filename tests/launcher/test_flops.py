"""Arithmetic and parameters of a model, against sums done by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from launcher.flops import Shape, flops_per_token, mfu, parameter_counts, peak_flops, visible_keys

TINY = Shape(
    layers=2,
    width=8,
    vocab=10,
    seq_len=8,
    heads=4,
    groups=2,
    head_dim=3,
    hidden=5,
    attention="nsa",
    compress_block=4,
    compress_stride=2,
    select_block=2,
    selected=2,
    window=3,
    ffn="dynmoe",
    experts=6,
    target_experts=1.5,
    deepembed="output",
)


def test_visible_keys_of_a_short_document_are_those_counted_by_hand() -> None:
    keys = visible_keys(TINY)
    # Blocks [0..3], [2..5], [4..7] end at 3, 5, 7: queries 0…7 see 0 0 0 1 1 2 2 3 of them.
    assert keys.compressed == 9 / 8
    # Two blocks of two tokens, the query's own one up to the query: 1 2 3 4 3 4 3 4.
    assert keys.selected == 24 / 8
    assert keys.window == (1 + 2 + 3 * 6) / 8
    assert keys.full == 36 / 8


@pytest.mark.parametrize(("S", "d", "l", "n"), [(1, 16, 32, 16), (31, 16, 32, 2), (200, 8, 32, 3)])
def test_visible_keys_equal_a_count_per_query(S: int, d: int, l: int, n: int) -> None:  # noqa: E741
    shape = dataclasses.replace(
        TINY, seq_len=S, compress_block=l, compress_stride=d, select_block=16, selected=n, window=20
    )
    compressed = selected = window = 0
    for t in range(S):
        compressed += sum(1 for i in range(S) if i * d + l - 1 <= t)
        own = t // 16
        chosen = list(range(own + 1))[-n:]
        selected += sum(1 for b in chosen for k in range(16 * b, 16 * b + 16) if k <= t)
        window += min(t + 1, 20)
    keys = visible_keys(shape)
    assert keys.compressed == pytest.approx(compressed / S)
    assert keys.selected == pytest.approx(selected / S)
    assert keys.window == pytest.approx(window / S)


def test_active_flops_of_a_tiny_model_equal_the_sum_by_hand() -> None:
    found = flops_per_token(TINY)
    queries_and_output = 2 * 8 * 12
    keys_and_values = 2 * 3 * 8 * 6
    gates = 8 * 12
    assert found == {
        "attention_projections": 6 * 2 * (queries_and_output + keys_and_values + gates),
        "router": 6 * 2 * 8 * 6,
        "experts": 6 * 2 * 1.5 * 3 * 8 * 5,
        "head": 6 * 8 * 10,
        "compression": 6 * 2 * (2 * 4 * 2 * 9) / 2,
        "attention_compressed": 2 * 12 * 12 * 9 / 8,
        "attention_scoring": 2 * 2 * 12 * 9 / 8,
        "attention_selected": 2 * 12 * 12 * 3.0,
        "attention_window": 2 * 12 * 12 * 21 / 8,
    }


def test_the_dense_counterpart_costs_what_a_plain_transformer_does() -> None:
    dense = dataclasses.replace(
        TINY, attention="full", ffn="dense", experts=1, target_experts=1.0, gated=False
    )
    assert flops_per_token(dense) == {
        "attention_projections": 6 * 2 * (2 * 8 * 12 + 2 * 8 * 6),
        "dense_ffn": 6 * 2 * 2 * 8 * 5,
        "head": 6 * 8 * 10,
        "attention_full": 2 * 12 * 12 * 4.5,
    }


def test_forward_arithmetic_at_64k_tokens_is_the_known_floor() -> None:
    shape = Shape(
        layers=1, width=64, vocab=1, seq_len=65536, heads=64, groups=4, head_dim=128, hidden=1
    )
    found = {k: v * 65536 / 1e12 for k, v in flops_per_token(shape).items()}
    assert found["attention_compressed"] / 3 == pytest.approx(4.4, abs=0.05)
    assert found["attention_scoring"] == pytest.approx(2.2, abs=0.05)
    assert found["attention_selected"] / 3 == pytest.approx(2.1, abs=0.05)
    assert found["attention_window"] / 3 == pytest.approx(1.1, abs=0.05)
    full = flops_per_token(dataclasses.replace(shape, attention="full"))["attention_full"]
    assert full / 3 * 65536 / 1e12 == pytest.approx(70.4, abs=0.1)


def test_parameters_by_component() -> None:
    found = parameter_counts(TINY)
    assert found.total == {
        "embedding": 80,
        "attention": 2 * (2 * 8 * 12 + 2 * 3 * 8 * 6),
        "norms": 5 * 8,
        "gates": 2 * 3 * 4 * (8 + 1),
        "compression": 2 * 2 * (4 * 9 + 4 * 3),
        "router": 2 * (8 * 6 + 6 + 1),
        "experts": 2 * 3 * 8 * 6 * 5,
    }
    assert found.active["experts"] == 2 * 3 * 8 * 1.5 * 5
    assert found.active["embedding"] == 8 and found.active["head"] == 80
    assert found.table == 10 * 2 * 8 and found.table_active == 16
    untied = parameter_counts(dataclasses.replace(TINY, tied=False, deepembed="hidden"))
    assert untied.total["head"] == 80 and untied.table == 10 * 2 * 5


def test_utilisation_is_the_share_of_all_devices_peak() -> None:
    assert mfu(1e6, 989e6, "NVIDIA H100 80GB HBM3") == pytest.approx(1.0)
    assert mfu(1e6, 989e6, "NVIDIA H200", devices=2) == pytest.approx(0.5)
    assert mfu(1e6, 989e6, torch.device("cpu")) is None
    assert mfu(1e6, 989e6, "A machine nobody knows") is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
    ],
)
def test_names_that_contain_each_other_are_told_apart(name: str, peak: float) -> None:
    assert peak_flops(name) == peak
