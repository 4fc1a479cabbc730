"""The whole model: causal, blind to other documents, trained in every part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import Documents
from kernels.rows import row_index, split_layers, unique_ids
from launcher.components import shape_of
from launcher.flops import parameter_counts
from tiny_onn.attention import AttentionConfig
from tiny_onn.deepembed import DeepEmbedConfig
from tiny_onn.dynmoe_config import DynMoeConfig
from tiny_onn.generation import Sampling, generate
from tiny_onn.modular import ModelConfig, ModelOutput, TinyOnn

V = 97
SPARSE = ModelConfig(
    vocab_size=V,
    width=32,
    layers=2,
    attention=AttentionConfig(
        kind="nsa",
        heads=4,
        groups=2,
        head_dim=16,
        compress_block=8,
        compress_stride=4,
        select_block=16,
        selected=3,
        window=24,
    ),
    ffn=DynMoeConfig(experts=4, expert_hidden=16, target_experts=2.0, max_experts=3),
    deepembed=DeepEmbedConfig(kind="output", partition="zero3"),
)
DENSE = replace(
    SPARSE,
    attention=replace(SPARSE.attention, kind="full"),
    ffn=replace(SPARSE.ffn, kind="dense"),
    deepembed=DeepEmbedConfig(kind="off"),
)
HIDDEN = replace(SPARSE, deepembed=DeepEmbedConfig(kind="hidden", partition="zero3"))
KINDS = {"sparse": SPARSE, "dense": DENSE, "hidden": HIDDEN}
ONE = torch.ones(())


def _model(cfg: ModelConfig, seed: int = 0) -> TinyOnn:
    torch.manual_seed(seed)
    model = TinyOnn(cfg)
    if model.deepembed_table is not None:
        torch.nn.init.normal_(model.deepembed_table.weight, std=0.1)
    return model


def _logits(model: TinyOnn, ids: Tensor, docs: Documents) -> Tensor:
    with torch.no_grad():
        out = model(ids, None, docs, ONE)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_changing_the_future_changes_no_logit_before_it(kind: str) -> None:
    # A matrix product rounds a row by how many others come with it, on some CPUs. In fp64 that is
    # far below anything that comes from another token.
    model = _model(KINDS[kind]).eval().double()
    docs = Documents([50, 90])
    ids = torch.randint(0, V, (140,))
    before = _logits(model, ids, docs)
    for at in (10, 49, 51, 100, 139):
        changed = ids.clone()
        changed[at:] = (changed[at:] + 1) % V
        after = _logits(model, changed, docs)
        torch.testing.assert_close(after[:at], before[:at], rtol=0.0, atol=1e-13)
        assert (after[at:] - before[at:]).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_does_not_see_its_neighbours(kind: str) -> None:
    model = _model(KINDS[kind]).eval()
    ids = torch.randint(0, V, (140,))
    together = _logits(model, ids, Documents([50, 90]))
    torch.testing.assert_close(
        together[:50], _logits(model, ids[:50], Documents([50])), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        together[50:], _logits(model, ids[50:], Documents([90])), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    model = _model(KINDS[kind])
    ids = torch.randint(0, V, (140,))
    output = model(ids, ids.roll(-1), Documents([50, 90]), ONE / 140)
    assert isinstance(output, ModelOutput)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # A term that all compressed keys share never changes a softmax: exactly zero for "linear".
        if not name.endswith("phi_k_position_lD"):
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_activation_checkpointing_changes_no_loss_and_no_gradient(kind: str) -> None:
    ids = torch.randint(0, V, (140,))
    gradients = []
    for keep in ("none", "recompute", "offload"):
        model = _model(replace(KINDS[kind], activation_checkpointing=keep))
        output = model(ids, ids.roll(-1), Documents([50, 90]), ONE / 140)
        output.loss.backward()
        gradients.append(
            [output.loss.detach()] + [p.grad for p in model.parameters()]  # type: ignore[misc]
        )
    for plain, recomputed, offloaded in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)
        assert torch.equal(plain, offloaded)


def test_checkpointing_has_its_earlier_names_and_refuses_others() -> None:
    assert ModelConfig(activation_checkpointing=True).activation_checkpointing == "recompute"
    assert ModelConfig(activation_checkpointing=False).activation_checkpointing == "none"
    with pytest.raises(ValueError, match="'disk' is none of none, recompute, offload"):
        ModelConfig(activation_checkpointing="disk")  # type: ignore[arg-type]


@pytest.mark.parametrize("home", ["rows", "zero3", "off"])
def test_input_embedding_in_the_rows_gives_the_same_loss_and_gradients(home: str) -> None:
    kind = "off" if home == "off" else "output"
    deepembed = replace(SPARSE.deepembed, partition="zero3", kind=kind)
    cfg = replace(SPARSE, tie_embeddings=False, deepembed=deepembed)
    inside = _model(cfg)
    own = replace(deepembed, partition="rows" if home == "rows" else "zero3")
    outside = TinyOnn(replace(cfg, deepembed=own, embedding_partition="rows"))
    state = {k: v for k, v in inside.state_dict().items() if not k.startswith("embedding")}
    if home == "rows":
        del state["deepembed_table.weight"]
    outside.load_state_dict(state)
    assert outside.cfg.row_parts == 1 + cfg.layers * (home == "rows")
    ids = torch.randint(0, V, (140,))
    unique, inverse = unique_ids(ids)
    parameters = dict(inside.named_parameters())
    rows = parameters["embedding.weight"].detach()[unique]
    if home == "rows":
        rows = torch.cat((rows, parameters["deepembed_table.weight"].detach()[unique]), dim=1)
    rows.requires_grad_()
    parts = split_layers(rows, outside.cfg.row_parts)
    index = row_index(inverse, len(unique))
    a = inside(ids, ids.roll(-1), Documents([50, 90]), ONE / 140)
    b = outside(ids, ids.roll(-1), Documents([50, 90]), ONE / 140, parts, index)
    torch.testing.assert_close(b.loss, a.loss)
    a.loss.backward()
    b.loss.backward()
    expected = parameters["embedding.weight"].grad
    assert expected is not None and rows.grad is not None
    torch.testing.assert_close(rows.grad[:, : cfg.width], expected[unique])
    with pytest.raises(ValueError, match="row-partitioned table"):
        outside(ids, ids.roll(-1), Documents([50, 90]), ONE / 140)


@pytest.mark.parametrize("transport", [torch.bfloat16, torch.float32])
def test_input_embedding_in_the_rows_feeds_a_bf16_model_whatever_rows_travel_in(
    transport: torch.dtype,
) -> None:
    deepembed = replace(SPARSE.deepembed, partition="rows")
    cfg = replace(SPARSE, tie_embeddings=False, deepembed=deepembed, embedding_partition="rows")
    torch.manual_seed(0)
    model = TinyOnn(cfg).bfloat16()
    ids = torch.randint(0, V, (140,))
    unique, inverse = unique_ids(ids)
    # Numbers that bf16 holds exactly, so that both ways must give the same bits.
    values = (0.1 * torch.randn(len(unique), cfg.row_width)).bfloat16()
    rows = values.to(transport).requires_grad_()
    parts = split_layers(rows, cfg.row_parts)
    index = row_index(inverse, len(unique))
    output = model(ids, ids.roll(-1), Documents([50, 90]), ONE / 140, parts, index)
    output.loss.backward()
    plain = model(
        ids,
        ids.roll(-1),
        Documents([50, 90]),
        ONE / 140,
        split_layers(values, cfg.row_parts),
        index,
    )
    assert torch.equal(output.loss, plain.loss)
    assert rows.grad is not None and rows.grad.dtype == transport
    assert rows.grad.isfinite().all() and (rows.grad != 0).any(dim=1).all()


def test_input_embedding_in_the_rows_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="tie_embeddings: false"):
        replace(SPARSE, tie_embeddings=True, embedding_partition="rows")
    hidden = replace(SPARSE.deepembed, kind="hidden", partition="rows")
    with pytest.raises(ValueError, match="equal parts"):
        replace(SPARSE, tie_embeddings=False, deepembed=hidden, embedding_partition="rows")
    with pytest.raises(ValueError, match="none of zero3, rows"):
        replace(SPARSE, embedding_partition="columns")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"ffn": DynMoeConfig()}, "ffn.kind dynmoe"),
        ({"activation_checkpointing": "none"}, "activation_checkpointing none"),
        ({"deepembed": DeepEmbedConfig(kind="hidden", keep_output=True)}, "kind hidden"),
        ({"deepembed": DeepEmbedConfig(partition="zero3", keep_output=True)}, "partition zero3"),
    ],
)
def test_keeping_an_output_that_is_not_there_is_refused(
    changes: dict[str, Any], named: str
) -> None:
    keeps = replace(
        DENSE, deepembed=DeepEmbedConfig(keep_output=True), activation_checkpointing="recompute"
    )
    with pytest.raises(ValueError, match=f"keep_output .*{named}.* set it to false"):
        replace(keeps, **changes)


@pytest.mark.parametrize("kind", ["sparse", "hidden", "dense hidden"])
def test_both_homes_of_the_table_give_the_same_loss_and_gradients(kind: str) -> None:
    ids = torch.randint(0, V, (140,))
    cfg = replace(HIDDEN, ffn=DENSE.ffn) if kind == "dense hidden" else KINDS[kind]
    inside = _model(cfg)
    assert inside.deepembed_table is not None
    table = inside.deepembed_table.weight
    outside = TinyOnn(replace(cfg, deepembed=replace(cfg.deepembed, partition="rows")))
    own = {k: v for k, v in inside.state_dict().items() if not k.startswith("deepembed_table")}
    outside.load_state_dict(own)
    unique, inverse = unique_ids(ids)
    rows = table.detach()[unique].requires_grad_()
    docs = Documents([50, 90])
    a = inside(ids, ids.roll(-1), docs, ONE / 140)
    assert rows.shape[1] == outside.cfg.row_width == cfg.layers * cfg.deepembed_width
    layers = split_layers(rows, cfg.layers)
    b = outside(ids, ids.roll(-1), docs, ONE / 140, layers, row_index(inverse, len(unique)))
    a.loss.backward()
    b.loss.backward()
    assert torch.equal(a.loss, b.loss)
    assert table.grad is not None and rows.grad is not None
    assert torch.equal(table.grad[unique], rows.grad)
    assert bool((rows.grad.view(-1, cfg.layers, cfg.deepembed_width) != 0).any(2).all())


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_token_by_token_gives_the_logits_of_the_whole(kind: str) -> None:
    model = _model(KINDS[kind]).eval()
    ids = torch.randint(0, V, (75,))
    whole = _logits(model, ids, Documents([75]))
    caches = model.new_caches()
    with torch.no_grad():
        steps = [model(t[None], None, None, ONE, None, None, caches)[0] for t in ids]
    torch.testing.assert_close(torch.stack(steps), whole, rtol=1e-3, atol=1e-4)


def test_greedy_generation_takes_the_likeliest_token_each_time() -> None:
    model = _model(SPARSE).eval()
    prompt = [5, 9, 2]
    drawn = list(generate(model, model, prompt, 20, sampling=Sampling(temperature=0)))
    ids = list(prompt)
    for token in drawn:
        assert token == int(_logits(model, torch.tensor(ids), Documents([len(ids)]))[-1].argmax())
        ids.append(token)
    assert len(drawn) == 20


def test_generation_is_repeatable_and_refuses_an_empty_prompt() -> None:
    model = _model(SPARSE).eval()
    first = list(generate(model, model, [1], 12, sampling=Sampling(seed=4)))
    assert first == list(generate(model, model, [1], 12, sampling=Sampling(seed=4)))
    assert first != list(generate(model, model, [1], 12, sampling=Sampling(seed=5)))
    with pytest.raises(ValueError, match="prompt"):
        list(generate(model, model, [], 1))


def test_the_vocabulary_must_be_known() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        TinyOnn(replace(SPARSE, vocab_size=0))


def test_the_parameter_count_that_is_shown_is_the_models() -> None:
    for cfg in (SPARSE, DENSE, HIDDEN):
        counts = parameter_counts(shape_of(cfg, 140))
        model = TinyOnn(cfg)
        held = sum(p.numel() for p in model.parameters())
        assert sum(counts.total.values()) + counts.table == held
