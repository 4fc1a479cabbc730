"""Full attention over packed documents equals the definition; decoding equals it row for row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.full_attention import FullCache, full_attention, full_decode


def reference(q_THD: Tensor, k: Tensor, v: Tensor, docs: Documents, scale: float) -> Tensor:
    T, H, _ = q_THD.shape
    per_group = H // k.shape[1]
    k, v = (x.double().repeat_interleave(per_group, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q_THD.double(), k) * scale
    doc, t = torch.repeat_interleave(torch.tensor(docs.lengths)), torch.arange(T)
    visible = (doc[:, None] == doc) & (t[:, None] >= t)
    p = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", p, v)


def inputs(T, H=4, G=2, D=16, E=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    shapes = ((T, H, D), (T, G, D), (T, G, E))
    return [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("lengths", [[1], [200], [1, 63, 64, 65, 1, 1, 130]])
@pytest.mark.parametrize(("H", "G", "D", "E"), [(4, 4, 16, 16), (8, 2, 16, 8), (16, 1, 8, 8)])
def test_full_attention_and_its_gradients_equal_the_definition(lengths, H, G, D, E):
    docs = Documents(lengths)
    leaves = inputs(docs.total, H, G, D, E)
    for scale in (None, 0.5):
        found = full_attention(*leaves, docs, scale=scale)
        wanted = reference(*leaves, docs, D**-0.5 if scale is None else scale)
        assert torch.allclose(found.double(), wanted, atol=1e-5)
        upstream = torch.randn_like(found)
        for f, w in zip(
            torch.autograd.grad(found, leaves, upstream),
            torch.autograd.grad(wanted, leaves, upstream.double()),
            strict=True,
        ):
            assert torch.allclose(f, w.to(f.dtype), atol=3e-5)


def test_neither_the_future_nor_another_document_changes_a_row():
    docs = Documents([100, 80])
    q, k, v = (x.detach() for x in inputs(180))
    before = full_attention(q, k, v, docs)
    for x in (q, k, v):
        x[150:] = x[150:] * -2.0
        x[:100] = x[:100] + 1.0
    after = full_attention(q, k, v, docs)
    assert torch.equal(before[100:150], after[100:150])
    assert not torch.equal(before[150:], after[150:])


@pytest.mark.parametrize(("H", "G", "E"), [(4, 2, 16), (8, 8, 16), (4, 1, 8)])
def test_decoding_equals_the_forward_pass(H, G, E):
    T = 300
    q, k, v = (x.detach() for x in inputs(T, H, G, 16, E))
    wanted = full_attention(q, k, v, Documents([T]))
    cache = FullCache()
    for t in range(T):
        assert cache.length == t
        row = full_decode(q[t : t + 1], k[t : t + 1], v[t : t + 1], cache)
        assert torch.allclose(row[0], wanted[t], atol=2e-6)


def test_shapes_that_do_not_fit_are_refused():
    q, k, v = inputs(10)
    with pytest.raises(ValueError, match="documents of 9 tokens do not fit"):
        full_attention(q, k, v, Documents([9]))
    with pytest.raises(ValueError, match="do not fit"):
        full_attention(q[:, :3], k, v, Documents([10]))


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[300], [150, 150], [1, 63, 64, 65, 107]])
@pytest.mark.parametrize(("D", "E"), [(64, 64), (64, 32)])
def test_full_attention_on_a_gpu_equals_the_definition(lengths, D, E):
    leaves = inputs(300, 8, 2, D, E, torch.bfloat16)
    wanted = reference(*leaves, Documents(lengths), D**-0.5)
    upstream = torch.randn(wanted.shape).bfloat16()
    wanted_grads = torch.autograd.grad(wanted, leaves, upstream.double())
    on_gpu = [x.detach().cuda().requires_grad_() for x in leaves]
    found = full_attention(*on_gpu, Documents(lengths, "cuda:0"))
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.cpu().double(), wanted, atol=0.02, rtol=0.02)
    for f, w in zip(torch.autograd.grad(found, on_gpu, upstream.cuda()), wanted_grads, strict=True):
        f, w = f.cpu().double(), w.double()  # noqa: PLW2901
        assert (f - w).norm() < 0.02 * w.norm()
