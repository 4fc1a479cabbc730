"""DeepEmbed scales by 1 + delta, starts as the identity, and learns alike in both partitions."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.rows import row_index, split_layers, unique_ids
from parallel.mesh import Mesh
from parallel.tables import RowTable
from tiny_onn.activations import Activations
from tiny_onn.deepembed import DeepEmbedConfig, DeepEmbedScale, DeepEmbedTable, LayerRows

LAYERS, WIDTH, VOCABULARY, TOKENS = 3, 8, 21, 40
MESH = Mesh(0, 1, 0, 1, torch.device("cpu"), 1, 1)


class Stack(nn.Module):
    """L feed-forward maps, each scaled by its layer's vectors."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.ffn = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.scale = nn.ModuleList(DeepEmbedScale(i, WIDTH) for i in range(LAYERS))

    def forward(self, x, values, index, *, split=True, modulate=True, checkpointing=False):
        parts = split_layers(values, LAYERS) if split else [values] * LAYERS

        def block(i, x, part, index):
            y = self.ffn[i](x).tanh()
            if modulate:
                return x + self.scale[i].modulate(y, part, index)
            return x + y * (1 + self.scale[i](part, index))

        for i in range(LAYERS):
            if checkpointing:
                x = torch.utils.checkpoint.checkpoint(
                    block, i, x, parts[i], index, use_reentrant=False
                )
            else:
                x = block(i, x, parts[i], index)
        return x.square().mean()


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return ids, torch.randn(TOKENS, WIDTH, generator=generator)


def test_zero_rows_leave_the_feed_forward_alone():
    ids, x = batch()
    unique, inverse = unique_ids(ids)
    scale = DeepEmbedScale(1, WIDTH)
    values = torch.zeros(len(unique), LAYERS * WIDTH)
    assert torch.equal(scale(values, inverse), torch.zeros(TOKENS, WIDTH))
    assert torch.equal(scale.modulate(x, values, inverse), x)


@pytest.mark.parametrize(
    "variant",
    [{"split": False}, {"modulate": False}, {"checkpointing": True}],
    ids=["whole rows", "scale then multiply", "activation checkpointing"],
)
def test_every_way_to_apply_the_scale_gives_the_same_loss_and_gradients(variant):
    ids, x = batch()
    unique, inverse = unique_ids(ids)
    stack = Stack()
    results = []
    for options in ({}, variant):
        values = torch.linspace(-1, 1, len(unique) * LAYERS * WIDTH).view(len(unique), -1)
        values.requires_grad_()
        stack.zero_grad()
        index = row_index(inverse, len(unique)) if options else inverse
        loss = stack(x, values, index, **options)
        loss.backward()
        results.append([loss.detach(), values.grad, *[p.grad.clone() for p in stack.parameters()]])
    for ours, other in zip(*results, strict=True):
        torch.testing.assert_close(ours, other)


class CountProducts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def test_kept_output_is_not_computed_again_and_changes_no_bit():
    ids, x = batch()
    torch.manual_seed(0)
    down = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
    results = []
    for kind in ("none", "recompute", "kept"):
        table = RowTable("t", VOCABULARY, LAYERS * WIDTH, MESH, DeepEmbedConfig(), groups=LAYERS)
        for i in range(LAYERS):
            table.draw_part(i, 0.3, i)
        down.zero_grad()
        rows = table.fetch(ids)
        activations = Activations("recompute" if kind == "kept" else kind)
        keep = activations.keep if kind == "kept" else None

        def block(x, i, own):
            y, scale = down[i](x.tanh()), DeepEmbedScale(i, WIDTH)
            return scale.modulate(y, own.values_UW, own.index, x, own.sink, own.keep)

        h = x.clone().requires_grad_()
        with CountProducts() as products:
            y = h * 1.0
            for i in range(LAYERS):
                sink = rows.parts.sink(i)
                own = LayerRows(rows.parts[i], rows.lookup, sink, keep)
                y = activations.run(block, y, i, own)
            y.square().mean().backward()
        table.accumulate(rows)
        grads = [rows.gradient.wait(i).clone() for i in range(LAYERS)]
        results.append([products.count, y, h.grad, *grads, *(p.grad for p in down.parameters())])
        table.close()
    plain, recomputed, kept = results
    assert recomputed[0] == plain[0] + LAYERS and kept[0] == plain[0]
    for other in (recomputed, kept):
        assert all(torch.equal(a, b) for a, b in zip(plain[1:], other[1:], strict=True))


def test_small_delta_survives_bf16():
    x = torch.full((1, WIDTH), 3.75, dtype=torch.bfloat16)
    values = torch.full((1, WIDTH), 1 / 300, dtype=torch.bfloat16)
    index = torch.zeros(1, dtype=torch.int64)
    exact = (x.double() * (1 + values.double())).bfloat16()
    assert torch.equal(1 + values, torch.ones_like(values))
    assert not torch.equal(exact, x)
    assert torch.equal(DeepEmbedScale(0, WIDTH).modulate(x, values, index), exact)


def test_rows_too_narrow_for_the_layer_are_refused():
    with pytest.raises(ValueError, match="layer 2 needs 8 columns"):
        DeepEmbedScale(2, WIDTH)(torch.zeros(1, 2 * WIDTH), torch.zeros(1, dtype=torch.int64))


def test_parameter_table_looks_up_its_rows_and_names_its_group():
    table = DeepEmbedTable(VOCABULARY, LAYERS * WIDTH, DeepEmbedConfig(lr_multiplier=3.0))
    nn.init.normal_(table.weight)
    ids, _ = batch()
    values, index = table(ids)
    assert torch.equal(values[index.inverse_T], table.weight[ids])
    assert table.weight.no_decay is True
    assert table.weight.lr_multiplier == 3.0
    assert not DeepEmbedTable(4, 4, DeepEmbedConfig()).weight.detach().any()


def test_both_partitions_learn_alike_when_every_row_is_touched():
    cfg = DeepEmbedConfig(optimizer="adam")
    parameter = DeepEmbedTable(VOCABULARY, LAYERS * WIDTH, cfg)
    adam = torch.optim.Adam(parameter.parameters(), lr=0.02, betas=cfg.betas, eps=cfg.eps)
    table = RowTable("deepembed", VOCABULARY, LAYERS * WIDTH, MESH, cfg)
    stack = Stack()
    for step in range(10):
        x = batch(step)[1][:VOCABULARY]
        ids = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(step))
        dense = stack(x, *parameter(ids))
        dense.backward()
        adam.step()
        adam.zero_grad()
        rows = table.fetch(ids)
        sparse = stack(x, rows.whole(), rows.lookup)
        sparse.backward()
        table.accumulate(rows)
        table.step(0.02)
        torch.testing.assert_close(sparse, dense, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        table.local_state()["weight"], parameter.weight.detach(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    "change", [{"kind": "input"}, {"partition": "columns"}, {"optimizer": "sgd"}]
)
def test_configurations_that_cannot_be_meant_are_refused_by_key(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        DeepEmbedConfig(**change).validate()
