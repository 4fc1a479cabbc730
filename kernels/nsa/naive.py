"""Oracle of Native Sparse Attention: the paper's equations in fp64, with every intermediate.

Slow and quadratic in memory per document and KV group on purpose: each visibility rule is written
down as a mask over (query, key) pairs, so that nothing here shares a trick with the fast paths.

Shapes: T tokens of all documents packed, H query heads, G KV groups, D head dim of q and k, E head
dim of v; n tokens of one document, N compressed blocks, J selection blocks, R = H / G heads of a
group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.nsa.spec import EMPTY_LSE, NsaCall, NsaSpec, Phi


@dataclass(frozen=True)
class NaiveNsa:
    """Everything that the oracle computed, fp64.

    Attributes:
        out_THE: gated sum of the branches (eq. 5).
        branches: outputs of compressed, selected and window branch before the gates, [T, H, E].
        lse: log-sum-exp of each branch's scaled scores, [T, H]; EMPTY_LSE where nothing is seen.
        p_compressed: per document, compressed probabilities [n, H, N] (eq. 8).
        importance: per document, block importance summed over the group [n, G, J] (eq. 9, 10).
        selection: per document, selected blocks as booleans [n, G, J] (eq. 11).
        k_compressed: per document, compressed keys [N, G, D] (eq. 7).
        v_compressed: per document, compressed values [N, G, E].
    """

    out_THE: Tensor
    branches: tuple[Tensor, Tensor, Tensor]
    lse: tuple[Tensor, Tensor, Tensor]
    p_compressed: list[Tensor]
    importance: list[Tensor]
    selection: list[Tensor]
    k_compressed: list[Tensor]
    v_compressed: list[Tensor]


def compress_naive(x_nGD: Tensor, phi: Phi | None, spec: NsaSpec) -> Tensor:
    """Eq. 7: map every complete overlapping block of one document to one token.

    Args:
        x_nGD: keys or values of one document.
        phi: the learned map; None takes the mean over the block.
        spec: block length and stride.

    Returns:
        [N, G, D] in x's dtype, N = 0 for a document shorter than a block.
    """
    blocks = []
    for i in range(spec.compressed_blocks(x_nGD.shape[0])):
        block_lGD = x_nGD[i * spec.stride : i * spec.stride + spec.block]
        if phi is None:
            blocks.append(block_lGD.mean(dim=0))
        else:
            shifted = block_lGD + phi.position_lD.to(x_nGD)[:, None]
            blocks.append(torch.einsum("lgd,lde->ge", shifted, phi.weight_lDD.to(x_nGD)))
    return torch.stack(blocks) if blocks else x_nGD[:0]


def masked_attention(
    q_nRD: Tensor, k_mD: Tensor, v_mE: Tensor, visible_nm: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention of all heads of one group over the visible keys (eq. 1 to 3).

    Returns:
        outputs [n, R, E], probabilities [n, R, m], log-sum-exp [n, R]; a query that sees no key
        gets zeros and EMPTY_LSE.
    """
    scores = torch.einsum("nrd,md->nrm", q_nRD, k_mD) * scale
    if k_mD.shape[0] == 0:
        empty = scores.sum(-1)
        return torch.einsum("nrm,me->nre", scores, v_mE), scores, empty + EMPTY_LSE
    some_n = visible_nm.any(-1)[:, None]
    # A blind query would be softmax over nothing: let it see everything, then drop the result.
    scores = scores.masked_fill(~(visible_nm | ~some_n)[:, None], float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    p_nRm = torch.exp(scores - lse[..., None]) * some_n[..., None]
    return torch.einsum("nrm,me->nre", p_nRm, v_mE), p_nRm, torch.where(some_n, lse, EMPTY_LSE)


def block_importance(p_nGRN: Tensor, spec: NsaSpec) -> Tensor:
    """Eq. 9 and 10: probability of the selected blocks, summed over the heads of the group.

    With 0-based indices, importance[j] = sum over m < l'/d, n < l/d of p[l'/d·j + m - n].

    Args:
        p_nGRN: compressed probabilities of the n queries of one document.
        spec: the sizes.

    Returns:
        [n, G, J].
    """
    n, G, _, N = p_nGRN.shape
    p_nGN = p_nGRN.sum(dim=2)
    importance = p_nGN.new_zeros(n, G, spec.selection_blocks(n))
    per_select, per_block = spec.select // spec.stride, spec.block // spec.stride
    for j in range(importance.shape[-1]):
        for m in range(per_select):
            for overlap in range(per_block):
                i = per_select * j + m - overlap
                if 0 <= i < N:
                    importance[..., j] += p_nGN[..., i]
    return importance


def forced_blocks(n: int, spec: NsaSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which blocks each of the n queries may select, and which it must: booleans [n, J]."""
    t = torch.arange(n, device=device)[:, None]
    j = torch.arange(spec.selection_blocks(n), device=device)[None]
    allowed = j <= t // spec.select
    forced = allowed & ((j < spec.initial) | (j > t // spec.select - spec.local))
    return allowed, forced


def select_naive(importance_nGJ: Tensor, spec: NsaSpec) -> Tensor:
    """Eq. 11: forced blocks and the most important others, `selected` in all; ties: lowest index.

    Returns:
        Booleans [n, G, J]; fewer than `selected` are set where the document has not as many yet.
    """
    n, G, J = importance_nGJ.shape
    allowed, forced = forced_blocks(n, spec, importance_nGJ.device)
    rank = importance_nGJ.detach().masked_fill(forced[:, None], float("inf"))
    rank = rank.masked_fill(~allowed[:, None], float("-inf"))
    order = rank.sort(dim=-1, descending=True, stable=True).indices[..., : spec.selected]
    chosen = torch.zeros(n, G, J, dtype=torch.bool, device=rank.device).scatter(-1, order, True)
    return chosen & allowed[:, None]


def selection_gap(importance_nGJ: Tensor, chosen_nGJ: Tensor, spec: NsaSpec) -> Tensor:
    """How far a selection is from the best one: 0 when right, otherwise the importance given away.

    Kernels sum in another order, so near ties may fall differently; compare by this, not by index.

    Args:
        importance_nGJ: the oracle's importance of one document.
        chosen_nGJ: booleans of the selection to be judged.
        spec: the sizes.

    Returns:
        [n, G]: best importance left out minus worst importance taken, clamped at 0, among blocks
        that are not forced; inf where a forced block is missing, a future one is taken, or the
        number of blocks is wrong.
    """
    n = importance_nGJ.shape[0]
    allowed, forced = forced_blocks(n, spec, importance_nGJ.device)
    free = (allowed & ~forced)[:, None]
    inf = float("inf")
    left_out = importance_nGJ.masked_fill(~free | chosen_nGJ, -inf).amax(-1)
    taken = importance_nGJ.masked_fill(~(free & chosen_nGJ), inf).amin(-1)
    gap = (left_out - taken).clamp(min=0.0)
    expected = allowed.sum(-1).clamp(max=spec.selected)[:, None]
    wrong = (forced[:, None] & ~chosen_nGJ).any(-1) | (chosen_nGJ & ~allowed[:, None]).any(-1)
    return gap.masked_fill(wrong | (chosen_nGJ.sum(-1) != expected), inf)


def nsa_naive(
    call: NsaCall,
    *,
    scale: float | None = None,
    selection: Sequence[Tensor] | None = None,
) -> NaiveNsa:
    """Native Sparse Attention in fp64 (arXiv 2502.11089, eq. 5 to 12), differentiable by autograd.

    Args:
        call: tensors of any floating dtype; its queries are those of all tokens.
        scale: of the scores; 1/sqrt(D) by default.
        selection: per document booleans [n, G, J] to use instead of the own top-k, so that a kernel
            whose near ties fell differently can be compared to the last digit.

    Returns:
        Outputs and intermediates, all fp64 on q's device.
    """
    T, H, D = call.q_THD.shape
    scale = D**-0.5 if scale is None else scale
    docs, spec = call.docs, call.spec
    G = call.k_cmp.shape[1]
    q = call.q_THD.double().reshape(T, G, H // G, D)
    kc, vc, ks, vs, kw, vw = (x.double() for x in call[1:7])
    phi_k, phi_v = (
        p and Phi(p.weight_lDD.double(), p.position_lD.double()) for p in (call.phi_k, call.phi_v)
    )
    branch_parts: tuple[list[Tensor], ...] = ([], [], [])
    lse_parts: tuple[list[Tensor], ...] = ([], [], [])
    result: dict[str, list[Tensor]] = {
        name: []
        for name in ("p_compressed", "importance", "selection", "k_compressed", "v_compressed")
    }
    for b, (start, n) in enumerate(zip(docs.starts, docs.lengths, strict=True)):
        own = slice(start, start + n)
        t = torch.arange(n, device=q.device)[:, None]
        s = torch.arange(n, device=q.device)[None]
        k_NGD = compress_naive(kc[own], phi_k, spec)
        v_NGE = compress_naive(vc[own], phi_v, spec)
        last = torch.arange(k_NGD.shape[0], device=q.device)[None] * spec.stride + spec.block - 1
        groups = [
            masked_attention(q[own, g], k_NGD[:, g], v_NGE[:, g], last <= t, scale)
            for g in range(G)
        ]
        p_nGRN = torch.stack([p for _, p, _ in groups], dim=1)
        importance = block_importance(p_nGRN.detach(), spec)
        chosen = select_naive(importance, spec) if selection is None else selection[b]
        for i, (k, v, seen_by_group) in enumerate(
            (
                (ks, vs, [chosen[:, g].repeat_interleave(spec.select, 1)[:, :n] for g in range(G)]),
                (kw, vw, [t - s < spec.window] * G),
            ),
            start=1,
        ):
            parts = [
                masked_attention(
                    q[own, g], k[own, g], v[own, g], seen_by_group[g] & (s <= t), scale
                )
                for g in range(G)
            ]
            branch_parts[i].append(torch.cat([o for o, _, _ in parts], dim=1))
            lse_parts[i].append(torch.cat([lse for _, _, lse in parts], dim=1))
        branch_parts[0].append(torch.cat([o for o, _, _ in groups], dim=1))
        lse_parts[0].append(torch.cat([lse for _, _, lse in groups], dim=1))
        result["p_compressed"].append(p_nGRN.flatten(1, 2))
        result["importance"].append(importance)
        result["selection"].append(chosen)
        result["k_compressed"].append(k_NGD)
        result["v_compressed"].append(v_NGE)
    c, s_, w = (torch.cat(parts) for parts in branch_parts)
    gate = call.gates_TH3.double().unsqueeze(-1)
    out = gate[:, :, 0] * c + gate[:, :, 1] * s_ + gate[:, :, 2] * w
    lc, ls, lw = (torch.cat(parts) for parts in lse_parts)
    return NaiveNsa(out_THE=out, branches=(c, s_, w), lse=(lc, ls, lw), **result)
