"""Plans: counts of the real model, formulas by hand, what does not fit, and what was measured."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher import config, plan_verb
from launcher.config import ConfigError, RunConfig
from launcher.plan_job import GIB, Job, Machine
from launcher.plan_memory import (
    PARTIAL_ROWS,
    PIECE,
    SCORED,
    activations,
    attention_buffers,
    attention_saved,
    ffn_saved,
    gpu_memory,
    host_memory,
    pair_buffers,
    states,
)
from launcher.plan_search import changed, correction_for, measured_points, problems, remedies
from launcher.plan_time import (
    attention_load,
    communication,
    compute_seconds,
    optimizer_seconds,
    ring,
    step_seconds,
    within,
)
from launcher.word_law import frequencies
from tests.launcher.tiny import CONFIG, REPOSITORY
from tiny_onn.modular import TinyOnn


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    path = tmp_path_factory.mktemp("plan") / "tiny.yaml"
    path.write_text(CONFIG.format(runs="runs", corpus="corpus"))
    cfg = config.load(path, ["--model.vocab_size", "512"])
    return replace(cfg, mesh=copy.copy(cfg.mesh))


def job(tiny: RunConfig, nodes: int = 1, per_node: int = 2, **changes: Any) -> Job:
    base = Job(copy.deepcopy(tiny), nodes, per_node)
    return changed(base, tuple((k.replace("__", "."), v) for k, v in changes.items()))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__attention__kind": "full", "model__ffn__kind": "dense"},
        {"model__deepembed__partition": "zero3", "model__tie_embeddings": False},
        {"model__deepembed__kind": "off", "model__ffn__shared_expert": True},
        {"model__tie_embeddings": False, "model__embedding_partition": "rows"},
    ],
)
def test_parameters_are_those_of_the_real_module(tiny: RunConfig, changes: dict[str, Any]) -> None:
    planned = job(tiny, **changes)
    model = TinyOnn(planned.cfg.model)
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.blocks[0].parameters())
    assert planned.block_parameters == pytest.approx(block, abs=32)


def test_pairs_are_the_capacity_that_the_expert_layer_takes(tiny: RunConfig) -> None:
    from tiny_onn.dynmoe import DynMoe

    planned = job(tiny)
    layer = DynMoe(planned.cfg.model.ffn, 32, planned.cfg.data.seq_len).train()
    spec = layer.to(torch.bfloat16).layer_spec()
    assert planned.pairs == spec.route.capacity(128, 4, spec.products.align)


def test_states_by_hand(tiny: RunConfig) -> None:
    gathered = {"engine__zero__resident_gib": 0.0}
    planned = job(tiny, per_node=4, **gathered)
    n = planned.parameters
    part = -(-n // 4)
    whole = states(job(tiny, per_node=4))
    block = planned.block_parameters
    outside = n - 2 * block
    assert whole["weights gathered"] == 2 * n
    moving = 2 * (block + outside) + 4 * 1.25 * (2 * block + outside)
    assert whole["gradients"] == 4 * part + moving
    assert states(planned) == {
        "weights": 2 * part,
        "weights gathered": 2 * n,
        "gradients": 4 * part + 6 * n,
        "optimizer": 12 * part,
        "table": 0.0,
    }
    alone = states(job(tiny, per_node=1))
    assert alone["weights gathered"] == 0 and alone["optimizer"] == 12 * n
    away = job(tiny, engine__offload__optimizer="cpu", engine__offload__params="cpu")
    assert states(away)["weights"] == states(away)["optimizer"] == 0
    half = -(-n // 2)
    host = host_memory(away)
    assert host["optimizer"] == 2 * 12 * half and host["gradients"] == 2 * 4 * half
    # adam_rowwise: weight and first moment of 2 layers x 32, a second moment each, a counter.
    assert host["table"] == 2 * 4 * 256 * (64 + 64 + 2 + 1)
    device = states(job(tiny, model__deepembed__tier="device"))
    assert device["table"] == 4 * 256 * (64 + 64 + 2 + 1)


def test_a_checkpoint_copies_a_table_on_the_device_and_reads_others_where_they_are(
    tiny: RunConfig,
) -> None:
    table = 4 * 256 * (64 + 64 + 2 + 1)
    off = host_memory(job(tiny, model__deepembed__kind="off"))
    for tier, share in (("device", 1.0), ("host", 0.25), ("nvme", 0.25)):
        copies = host_memory(
            job(tiny, model__deepembed__tier=tier, model__deepembed__nvme_path="/local")
        )["checkpoint"]
        assert copies - off["checkpoint"] == pytest.approx(2 * share * table), tier


def test_saved_tensors_by_hand(tiny: RunConfig) -> None:
    planned = job(tiny)
    t, C, H, G, D, b, g = 128, 32, 4, 2, 16, 3, 2
    norm = 6 * t * C
    projected = 2 * t * (H + 2 * b * G) * D + 4 * t * (H + b * G) * D
    worked_on = 2 * t * (H + 2 * b * g) * D
    nsa = t * H * (6 * D + 12 + 6) + 8 * t * g * 3 + 4 * (t // 4) * g * D
    assert attention_saved(planned) == norm + projected + worked_on + nsa + 2 * t * H * D
    # 64 tokens a sequence, in at most three of them: of 128 + 3 x 9 tokens every tenth explores.
    # Four experts' rows begin at multiples of 128.
    pairs = 128 * -(-(t * 3 + 15 + 4 * 127) // 128)
    assert planned.pairs == pairs
    assert ffn_saved(planned) == 6 * t * C + 2 * t * C + 17 * t * 4 + pairs * 72
    assert pair_buffers(planned) == 2 * (pairs * (96 + 32 + 32) + 3 * 32 * 16 * 4)
    shared = job(tiny, mesh__group=2)
    assert (shared.shard, shared.heads, shared.kv_groups) == (64, 2, 1)
    full = job(tiny, model__attention__kind="full", model__attention__qk_norm=False)
    assert attention_saved(full) == (
        norm + 2 * t * (H + 2 * G) * D * 2 + t * H * (2 * D + 4) + 2 * t * H * D
    )


def test_nsa_beyond_its_groups_costs_and_holds_what_the_padded_kernels_do() -> None:
    words = ["--model.vocab_size", "32768", "--data.seq_len", "131072"]
    cfg = config.load(REPOSITORY / "launcher/configs/1b.yaml", words)
    whole, split = (changed(Job(cfg, 1, 8), (("mesh.group", p),)) for p in (4, 8))
    assert (split.heads, split.kv_groups) == (whole.heads, whole.kv_groups) == (4, 1)
    assert split.spans == [[(0, 65536)], [(65536, 131072)]]
    # The last row's zero queries cost as much as others: nothing is saved.
    assert split.queries == whole.queries == 131072
    nsa = [f"attention_{part}" for part in ("compressed", "scoring", "selected", "window")]
    for part in (*nsa, "compression"):
        assert compute_seconds(split)[part] == pytest.approx(2 * compute_seconds(whole)[part])
    assert compute_seconds(split)["experts"] == compute_seconds(whole)["experts"]
    kept = [attention_saved(p) - 2 * p.shard * 16 * 128 for p in (whole, split)]
    own = [6 * p.shard * 2048 + (2 * 40 * 128 + 4 * 28 * 128) * p.shard for p in (whole, split)]
    assert kept[0] - own[0] == kept[1] - own[1] > 2**29
    assert attention_buffers(split) > attention_buffers(whole)
    # Full attention takes its own queries only.
    full = changed(split, (("model.attention.kind", "full"),))
    assert full.queries == 65536
    alone = changed(whole, (("model.attention.kind", "full"),))
    ratio = compute_seconds(full)["attention_full"] / compute_seconds(alone)["attention_full"]
    assert ratio == pytest.approx(3 / 2)
    # Rows that begin where a sequence does have no tokens in front of theirs.
    pair = changed(split, (("train.micro_batch", 2), ("data.seq_len", 65536)))
    assert pair.spans == [[(0, 65536)], [(0, 65536)]] and pair.queries == 65536
    assert attention_load(pair)["attention_compressed"] == attention_load(pair)["compression"] == 1


def test_a_larger_group_is_a_remedy_only_where_it_saves_memory() -> None:
    words = ["--model.vocab_size", "32768", "--data.seq_len", "131072", "--mesh.group", "4"]
    words += ["--model.activation_checkpointing", "offload", "--model.ffn.kind", "dense"]
    cfg = config.load(REPOSITORY / "launcher/configs/1b.yaml", words)
    planned = changed(Job(cfg, 1, 8), ())
    larger = changed(planned, (("mesh.group", 8),))
    need, after = (sum(gpu_memory(p).values()) / GIB for p in (planned, larger))
    # What attention works on stays, what a rank has per token of its own does not.
    assert 0 < need - after < 0.25 * need
    for gib, fits in ((after * 1.01, True), (after * 0.99, False)):
        tight = replace(planned, machine=Machine(gpu_gib=gib / (1 - Machine().reserve)))
        found = [changes for changes, _ in remedies(tight, 99)]
        assert ((("mesh.group", 8),) in found) == fits


def test_attention_buffers_by_hand(tiny: RunConfig) -> None:
    planned = job(tiny)
    T, H, D, g, n = 128, 4, 16, 2, 3
    slots, blocks = T * H * n, T // 16
    pieces = T * g * n // PIECE + 1 + g * blocks
    gradients = 2 * D * (2 * T * H + 6 * T * g + slots) + 8 * D * (T * g + 16 * pieces)
    assert attention_buffers(planned) == gradients + 30 * T * H + 8 * D * H * T // 4
    monster = job(tiny, data__seq_len=2**22, train__micro_batch=1)
    held = attention_buffers(monster)
    assert held > 2 * D * PARTIAL_ROWS + 8 * D * 2**22 * g


def test_sizes_of_the_kernels_buffers_are_those_of_the_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kernels.nsa import triton_config

    monkeypatch.setattr(triton_config, "INTERPRETED", False)
    for dim in (64, 128, 192):
        tiles = triton_config.kernel_configs(dim)
        found = (tiles.partial_rows, tiles.piece_backward, tiles.score_chunk)
        assert found == (PARTIAL_ROWS, PIECE, SCORED)


def test_a_kept_output_is_in_host_memory(tiny: RunConfig) -> None:
    kept: dict[str, Any] = {"model__ffn__kind": "dense", "model__deepembed__keep_output": True}
    again = "model__activation_checkpointing"
    host = host_memory(job(tiny, **kept, **{again: "recompute"}))
    assert host["DeepEmbed's inputs"] == 2 * 1 * 2 * 128 * 32
    assert host_memory(job(tiny, **kept))["DeepEmbed's inputs"] == 0
    sparse = host_memory(job(tiny, **{again: "recompute", "model__deepembed__keep_output": True}))
    assert sparse["DeepEmbed's inputs"] == 0


def test_checkpoints_keep_inputs_only_and_offload_two_of_them(tiny: RunConfig) -> None:
    deep = {"model__layers": 12}
    kept = {
        kind: activations(job(tiny, **deep, model__activation_checkpointing=kind))
        for kind in ("none", "recompute", "offload")
    }
    assert kept["none"]["attention, saved"] == 12 * kept["recompute"]["attention, saved"]
    assert kept["recompute"]["block inputs"] == 12 * 2 * 128 * 32
    assert kept["offload"]["block inputs"] == 2 * 2 * 128 * 32
    away = host_memory(job(tiny, **deep, model__activation_checkpointing="offload"))
    assert away["block inputs"] == 2 * 10 * 2 * 128 * 32


def test_traffic_by_hand(tiny: RunConfig) -> None:
    layout: dict[str, Any] = {"nodes": 2, "per_node": 4, "train__global_batch": 32}
    planned = job(tiny, **layout, engine__zero__resident_gib=0.0)
    n = planned.parameters
    assert communication(job(tiny, **layout))["zero gathers"].total == 2 * n * 7 / 8
    flow = ring(planned, 800.0)
    assert flow.total == 700 and flow.network == 100
    assert planned.micro_batches == 2
    found = communication(planned)
    assert found["zero gathers"].total == 2 * 4 * n * 7 / 8
    assert found["zero reductions"].network == pytest.approx(2 * 4 * n / 2 / 4)
    assert "group exchange" not in found
    shared = job(tiny, per_node=2, mesh__group=2)
    exchange = communication(shared)["group exchange"]
    # 4 + 12 heads of 16 and 12 gates there, 4 heads back, half of it stays; both passes' ways.
    once = 2 * 64 * ((16 * 16 + 12) + 64) / 2
    assert exchange.total == 2 * once * 2 * shared.micro_batches and exchange.network == 0
    split = job(tiny, per_node=4, mesh__group=4, model__activation_checkpointing="recompute")
    rows = 128 * 2 * 3 * 1 * 16 / 2
    once = 2 * (32 * ((16 * 16 + 12) + 64) / 2 + rows)
    assert communication(split)["group exchange"].total == 3 * once * 2 * split.micro_batches
    assert within(job(tiny, nodes=2, per_node=4), 8, 70.0).network == pytest.approx(40)


def test_times_add_up_and_follow_the_machine(tiny: RunConfig) -> None:
    launches = ("block", "eager", "nsa", "dynmoe", "gathered")
    slow = Machine(**{f"{part}_seconds": 0.0 for part in launches}, hop=0.0)
    planned = replace(job(tiny), machine=slow)
    fast = replace(planned, machine=replace(slow, peak_flops=2 * slow.peak_flops))
    for name, seconds in compute_seconds(planned).items():
        assert seconds == pytest.approx(2 * compute_seconds(fast)[name])
    assert optimizer_seconds(planned) == 30 * planned.partition / slow.hbm
    parts = step_seconds(planned)
    assert parts["compute"] == sum(compute_seconds(planned).values())
    assert step_seconds(planned, 3.0)["compute"] == pytest.approx(3 * parts["compute"])
    launching = replace(planned, machine=replace(slow, block_seconds=1.0))
    assert step_seconds(launching)["compute"] == 2 * planned.micro_batches
    again = job(tiny, model__activation_checkpointing="recompute")
    ratio = {k: compute_seconds(again)[k] / v for k, v in compute_seconds(job(tiny)).items()}
    assert ratio["experts"] == pytest.approx(4 / 3) and ratio["head"] == 1


def test_expected_unique_ids_are_those_of_a_draw(tiny: RunConfig) -> None:
    planned = job(tiny)
    p = torch.from_numpy(frequencies(512))
    assert p[0] / p[9] == pytest.approx(12.7 / 3.7) and p.sum() == pytest.approx(1)
    draws = [
        len(torch.multinomial(p, 128, replacement=True, generator=g).unique())
        for g in (torch.Generator().manual_seed(s) for s in range(200))
    ]
    assert planned.unique_ids == pytest.approx(sum(draws) / 200, rel=0.02)


def test_what_does_not_fit_is_named_with_changes_that_make_it_fit(tiny: RunConfig) -> None:
    cfg = config.load(REPOSITORY / "launcher/configs/7b.yaml", ["--model.vocab_size", "65536"])
    small = Job(cfg, 1, 8)
    (found, *_) = problems(small)
    assert found.startswith("GPU memory") and "optimizer" in found
    fixes = remedies(small)
    assert fixes
    for changes, cost in fixes:
        assert not problems(changed(small, changes)) and cost >= 1
    assert not problems(Job(cfg, 8, 8))
    assert problems(job(tiny)) == []
    # A GPU without room for whole weights: partitioned ones are the remedy.
    eager = {"engine__zero__max_live_parameters": 1, "engine__zero__reduce_bucket_size": 1}
    whole, parted = (
        sum(gpu_memory(job(tiny, per_node=4, engine__zero__resident_gib=gib, **eager)).values())
        for gib in (8.0, 0.0)
    )
    assert parted < whole
    room = (whole + parted) / 2 / GIB / (1 - Machine().reserve)
    tight = replace(job(tiny, per_node=4, **eager), machine=Machine(gpu_gib=room))
    assert (("engine.zero.resident_gib", 0.0),) in [changes for changes, _ in remedies(tight, 9)]


def test_measured_runs_stand_beside_the_plan_and_correct_it(tiny: RunConfig) -> None:
    described = {
        k: v
        for k, v in config.flat(job(tiny).cfg).items()
        if k.startswith(("model.", "data.seq_len", "train.", "mesh.", "engine."))
    }
    entry = {
        "config": described, "ranks": 2, "device": "NVIDIA H100 80GB HBM3", "memory_gib": 1.0,
        "tokens_per_s": 1000.0,
    }  # fmt: skip
    on_cpu = entry | {"device": "cpu"}
    points = measured_points({"sparse": entry, "cpu": on_cpu, "bad": {"error": "x"}}, Machine())
    (point,) = points
    assert point.seconds == pytest.approx(8 * 64 / 1000)
    planned = job(tiny)
    assert correction_for(planned, points) is point
    assert correction_for(job(tiny, model__attention__kind="full"), points) is None
    corrected = sum(step_seconds(planned, point.correction).values())
    assert corrected == pytest.approx(point.seconds)
    assert point.predicted_gib == sum(gpu_memory(planned).values()) / GIB
    with pytest.raises(ValueError, match="no run on a GPU"):
        measured_points({"cpu": on_cpu}, Machine())


def test_the_verb_prints_every_part_and_writes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    words = [str(REPOSITORY / "launcher/configs/7b.yaml"), "--nodes", "1", "512"]
    words += ["--json", str(out)]
    assert plan_verb.main(words) == 1
    text = capsys.readouterr().out
    for part in ("pair buffers", "optimizer", "zero gathers", "tokens/s", "would fit:", "assumed"):
        assert part in text, text
    plans = json.loads(out.read_text())["plans"]
    assert [p["gpus"] for p in plans] == [8, 4096]
    assert plans[0]["problems"] and not plans[1]["problems"]
    assert plans[1]["global_batch"] == 4096
    fits = [*words[:1], "--nodes", "8", "--mesh.group", "4"]
    assert plan_verb.main(fits) == 0
    assert "group exchange" in capsys.readouterr().out
    for option, number in (("--nodes", "0"), ("--gpus-per-node", "0"), ("--peak", "-1")):
        with pytest.raises(SystemExit):
            plan_verb.main([*words[:1], option, number])
        assert f"argument {option}: {number} must be" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"mesh\.group is 0: set it to 1"):
        plan_verb.main([*words[:1], "--mesh.group", "0"])
    with pytest.raises(ValueError, match="neither divides the 4 KV groups"):
        plan_verb.main([*words[:1], "--mesh.group", "3"])
