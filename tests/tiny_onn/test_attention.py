"""The attention module: causal per document, trained in every weight, alike when decoding."""

from __future__ import annotations

import pytest
import torch

from kernels.documents import Documents
from kernels.full_attention import FullCache
from tiny_onn.attention import Attention, AttentionConfig
from tiny_onn.norm_rope import rope_tables

C = 24
SIZES = {
    "heads": 4, "groups": 2, "head_dim": 8, "compress_block": 8, "compress_stride": 4,
    "select_block": 16, "selected": 3, "initial": 1, "local": 1, "window": 20, "init_std": 0.3,
}  # fmt: skip
KINDS = {
    "nsa": AttentionConfig(kind="nsa", **SIZES),
    "nsa shared": AttentionConfig(kind="nsa", shared_kv=True, **SIZES),
    "nsa mean": AttentionConfig(kind="nsa", compression="mean", qk_norm=False, **SIZES),
    "full": AttentionConfig(kind="full", **SIZES),
}


def build(cfg: AttentionConfig, dtype=torch.float32) -> Attention:
    torch.manual_seed(0)
    module = Attention(cfg, C)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "phi" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module.to(dtype)


def run(module: Attention, x, lengths):
    docs = Documents(lengths)
    cos, sin = rope_tables(docs.positions, module.cfg.rope_dim, module.cfg.rope_theta)
    return module(x, cos, sin, docs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_and_other_documents_change_nothing(kind):
    module = build(KINDS[kind])
    x = torch.randn(150, C)
    before = run(module, x, [60, 90])
    changed = x.clone()
    changed[:60] += 1.0
    changed[110:] *= -2.0
    after = run(module, changed, [60, 90])
    assert torch.equal(before[60:110], after[60:110])
    assert not torch.equal(before[110:], after[110:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_gives_the_same_wherever_it_is_packed(kind):
    module = build(KINDS[kind])
    x = torch.randn(90, C)
    alone = run(module, x, [90])
    packed = run(module, torch.cat([torch.randn(37, C), x, torch.randn(5, C)]), [37, 90, 5])
    assert torch.allclose(packed[37:127], alone, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_equals_the_forward_pass(kind):
    module = build(KINDS[kind])
    x = torch.randn(100, C)
    wanted = run(module, x, [100])
    cos, sin = rope_tables(torch.arange(100), module.cfg.rope_dim, module.cfg.rope_theta)
    cache = module.new_cache()
    with torch.no_grad():
        for t in range(100):
            assert cache.length == t
            one = slice(t, t + 1)
            row = module(x[one], cos[one], sin[one], None, cache)
            assert torch.allclose(row[0], wanted[t], atol=2e-5), f"token {t}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_even_from_tiny_documents(kind):
    module = build(KINDS[kind])
    run(module, torch.randn(120, C), [120]).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        if name != "phi_k_position_lD":  # moves all compressed keys alike: no softmax changes
            assert parameter.grad.abs().max() > 1e-4, name
    module.zero_grad(set_to_none=True)
    run(module, torch.randn(3, C), [1, 2]).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_in_bf16_out(kind):
    module = build(KINDS[kind], torch.bfloat16)
    y = run(module, torch.randn(70, C).bfloat16(), [30, 40])
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()


def test_learned_compression_starts_as_the_mean():
    torch.manual_seed(0)
    learned = Attention(AttentionConfig(**SIZES), C)
    torch.manual_seed(0)
    mean = Attention(AttentionConfig(compression="mean", **SIZES), C)
    x = torch.randn(100, C)
    assert torch.allclose(run(learned, x, [100]), run(mean, x, [100]), atol=1e-5)


def test_statistics_are_recorded_on_demand_only():
    module = build(KINDS["nsa"])
    x = torch.randn(100, C)
    run(module, x, [100])
    assert module.stats == {}
    module.record = True
    run(module, x, [100])
    assert set(module.stats) == {
        "gate_compressed", "gate_selected", "gate_window", "selected_distance",
    }  # fmt: skip
    assert all(v.dim() == 0 and not v.requires_grad for v in module.stats.values())
    assert 0 < float(module.stats["gate_window"]) < 1
    assert float(module.stats["selected_distance"]) > 0
    full = build(KINDS["full"])
    full.record = True
    run(full, x, [100])
    assert full.stats == {}


def test_gates_start_at_a_third():
    module = Attention(AttentionConfig(**{**SIZES, "init_std": 0.02}), C)
    module.record = True
    run(module, torch.randn(100, C), [100])
    assert abs(float(module.stats["gate_selected"]) - 1 / 3) < 0.02


def test_gates_and_positions_do_not_decay():
    plain = {n for n, p in build(KINDS["nsa"]).named_parameters() if getattr(p, "no_decay", False)}
    assert plain == {"w_gate_GC", "b_gate_G", "phi_k_position_lD", "phi_v_position_lD"}


def test_activation_checkpointing_gives_the_same_gradients():
    module = build(KINDS["nsa"])
    x = torch.randn(100, C, requires_grad=True)
    docs = Documents([60, 40])
    cos, sin = rope_tables(docs.positions, module.cfg.rope_dim, module.cfg.rope_theta)
    grads = []
    for again in (False, True):
        if again:
            y = torch.utils.checkpoint.checkpoint(module, x, cos, sin, docs, use_reentrant=False)
        else:
            y = module(x, cos, sin, docs)
        grads.append(torch.autograd.grad(y.square().sum(), [x, *module.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 5}, "attention.heads = 5 must be a multiple of attention.groups = 2"),
        ({"head_dim": 7}, "attention.head_dim must be even"),
        ({"kind": "dense"}, "attention.kind 'dense' is none of"),
        ({"compression": "max"}, "attention.compression 'max' is none of"),
        (
            {"compress_block": 10},
            "attention.compress_block = 10 must be a multiple of attention.co",
        ),
        ({"select_block": 18}, "attention.select_block = 18 must be a multiple of"),
        ({"selected": 1}, "attention.selected = 1 leaves no room for"),
        ({"window": 0}, "attention.window must be >= 1, got 0"),
        ({"rope_theta": 0.0}, "attention.rope_theta must be positive"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_key(wrong, message):
    with pytest.raises(ValueError) as error:
        AttentionConfig(**{**SIZES, **wrong})
    assert message in str(error.value)


def test_documents_and_cache_exclude_each_other():
    module = build(KINDS["nsa"])
    cos, sin = rope_tables(torch.arange(1), module.cfg.rope_dim, module.cfg.rope_theta)
    x = torch.randn(1, C)
    with pytest.raises(ValueError, match="exactly one"):
        module(x, cos, sin, None)
    with pytest.raises(ValueError, match="NSA needs an NsaCache, got FullCache"):
        module(x, cos, sin, None, FullCache())
