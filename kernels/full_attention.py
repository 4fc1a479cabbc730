"""Full causal attention over packed documents: the dense baseline of NSA, and its decoding.

Shapes: T tokens packed, H query heads, G KV groups, R = H / G, D head dim of q and k, E of v.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.documents import Documents
from kernels.token_buffer import TokenBuffer

BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""Of scaled_dot_product_attention on a GPU, the fastest first."""

SHORTEST = 128
"""Tokens of a document from which on a batch of equal ones goes to those."""


def full_attention(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGE: Tensor,
    docs: Documents,
    *,
    scale: float | None = None,
    first: int = 0,
) -> Tensor:
    """Softmax attention of every token over its document up to itself, differentiable.

    In half precision on a GPU, documents of one length (and a single one) are a batch for cuDNN,
    whose kernels are about twice as fast on Hopper as the variable-length flash kernel, which takes
    documents of several lengths in one call. Everything else is one scaled_dot_product_attention
    per document.

    Args:
        q_THD: queries [T, H, D], or [n, H, D] of the tokens [first, first + n); so is the result.
        k_TGD: keys [T, G, D]; each serves H / G query heads.
        v_TGE: values [T, G, E].
        docs: document boundaries.
        scale: of the scores; 1/sqrt(D) by default.
        first: token of the first query.

    Returns:
        [T, H, E] in q's dtype.

    Raises:
        ValueError: shapes do not fit together.
    """
    (n, H, D), (T, G, E) = q_THD.shape, v_TGE.shape
    if docs.total != T or k_TGD.shape != (T, G, D) or H % G or not first <= first + n <= T:
        raise ValueError(
            f"q {tuple(q_THD.shape)} from token {first} on, k {tuple(k_TGD.shape)}, "
            f"v {tuple(v_TGE.shape)} and documents of {docs.total} tokens do not fit: "
            "T must agree, H be a multiple of G, k [T, G, D]"
        )
    if n != T:
        begin, docs = docs.seen_by(first, first + n)
        k_TGD, v_TGE = k_TGD[begin : first + n], v_TGE[begin : first + n]
    lead = docs.total - n
    scale = D**-0.5 if scale is None else scale
    half = q_THD.dtype in {torch.bfloat16, torch.float16}
    alike = D == E and lead == 0 and len(set(docs.lengths)) == 1 and docs.lengths[0] >= SHORTEST
    if q_THD.is_cuda and half and alike:
        return _equal_documents(q_THD, k_TGD, v_TGE, len(docs.lengths), scale)
    several = len(docs.lengths) > 1 or lead > 0
    if q_THD.is_cuda and half and several and D == E and D % 8 == 0 and D <= 256:
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q_THD, k_TGD, v_TGE, (docs.cu_seqlens - lead).clamp_(min=0), docs.cu_seqlens,
            docs.longest, docs.longest,
            0.0, True, False, scale=scale,
        )[0]  # fmt: skip
        return out
    lengths = list(docs.lengths)
    queries = [lengths[0] - lead, *lengths[1:]]
    # split, not slices: its backward is one concatenation instead of a full-size tensor each.
    parts = [
        _one_document(q, k, v, scale)
        for q, k, v in zip(
            torch.split(q_THD, queries),
            torch.split(k_TGD, lengths),
            torch.split(v_TGE, lengths),
            strict=True,
        )
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _equal_documents(
    q_THD: Tensor, k_TGD: Tensor, v_TGE: Tensor, documents: int, scale: float
) -> Tensor:
    """Attend in documents of the same length, as a batch; cuDNN first, then what torch has."""
    T, H, _ = q_THD.shape
    S, E = T // documents, v_TGE.shape[2]
    q, k, v = (x.reshape(documents, S, *x.shape[1:]).transpose(1, 2) for x in (q_THD, k_TGD, v_TGE))
    with sdpa_kernel(BACKENDS, set_priority=True):
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=k_TGD.shape[1] < H
        )
    return out.transpose(1, 2).reshape(T, H, E)


def _one_document(q_nHD: Tensor, k_mGD: Tensor, v_mGE: Tensor, scale: float) -> Tensor:
    """Attend with the last n of a document's m tokens."""
    n, H, D = q_nHD.shape
    m, G, E = v_mGE.shape
    R = H // G
    mask = None
    if n < m:
        mask = torch.ones(n, m, dtype=torch.bool, device=q_nHD.device).tril_(m - n)
    if q_nHD.is_cuda:
        # One batch of H heads, so that cuDNN and flash attention are among the choices.
        q, k, v = (x.transpose(0, 1)[None] for x in (q_nHD, k_mGD, v_mGE))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=R > 1
        )
        return out[0].transpose(0, 1)
    # A group as a batch: its heads then share keys and values without a copy.
    q = q_nHD.view(n, G, R, D).permute(1, 2, 0, 3)
    k = k_mGD.transpose(0, 1)[:, None].expand(G, R, m, D)
    v = v_mGE.transpose(0, 1)[:, None].expand(G, R, m, E)
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale
    )
    return out.permute(2, 0, 1, 3).reshape(n, H, E)


class FullCache:
    """Keys and values of one sequence for `full_decode`."""

    def __init__(self) -> None:
        """Start empty; memory is taken as tokens come."""
        self.k, self.v = TokenBuffer(), TokenBuffer()

    @property
    def length(self) -> int:
        """Tokens so far."""
        return self.k.length


def full_decode(
    q_1HD: Tensor, k_1GD: Tensor, v_1GE: Tensor, cache: FullCache, *, scale: float | None = None
) -> Tensor:
    """Append one token and attend with it: the last row of `full_attention` over all tokens so far.

    Args:
        q_1HD: query of the new token [1, H, D].
        k_1GD: its key [1, G, D].
        v_1GE: its value [1, G, E].
        cache: of this sequence; it grows by the token.
        scale: of the scores; 1/sqrt(D) by default.

    Returns:
        [1, H, E] in q's dtype. Not differentiable.
    """
    with torch.no_grad():
        cache.k.append(k_1GD)
        cache.v.append(v_1GE)
        _, H, D = q_1HD.shape
        G, E = v_1GE.shape[1:]
        q = q_1HD.view(1, G, H // G, D).transpose(0, 1)
        k = cache.k.view(0, cache.length).transpose(0, 1)[:, None]
        v = cache.v.view(0, cache.length).transpose(0, 1)[:, None]
        # The group's heads are the rows: all of them see every key so far.
        out = F.scaled_dot_product_attention(q.view(G, 1, H // G, D), k, v, scale=scale)
        return out.reshape(1, H, E)
