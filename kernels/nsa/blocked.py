"""Native Sparse Attention in tiles of queries with torch operations, for CPUs and any GPU.

Each tile of neighbouring queries attends, per branch, to one contiguous range of keys under an
additive mask (plan.py); there is no loop over documents, and no score outlives its tile. Which
columns a tile computes depends on document lengths only, never on scores, so that a token's output
is bitwise the same whatever the later tokens are. The price is that the selected branch computes
every block up to the tile and masks those that were not chosen: memory is linear in the length,
arithmetic of this branch quadratic. For documents of a few thousand tokens that is faster on a CPU
than gathering blocks query by query.

The backward is bitwise deterministic: every tile adds into its own rows, tile after tile.

Shapes: T tokens packed, H query heads, G KV groups, R = H / G, D head dim of q and k, E of v,
N compressed slots, B queries of a tile, J its selection blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.nsa.compression import compress
from kernels.nsa.plan import Plan, Tile, plan_for
from kernels.nsa.selection import block_importance, block_indices, choose_blocks, sum_heads
from kernels.nsa.spec import NsaCall
from kernels.nsa.tile_attention import attend, attend_backward, scores


def _select(q_GRBD: Tensor, k_NGD: Tensor, plan: Plan, tile: Tile, scale: float) -> Tensor:
    """Selected blocks of a scored tile, booleans [G, B, J]."""
    mask = plan.compressed_mask(tile)
    s = scores(q_GRBD, k_NGD[plan.compressed_columns(tile)], mask.to(_wide_dtype(q_GRBD)), scale)
    p = torch.softmax(s, dim=-1)
    if tile.some_blind:
        # Softmax of a row that sees nothing is NaN; such a row has no importance.
        p = p.nan_to_num_(0.0)
    importance = block_importance(sum_heads(p), plan.spec)
    return choose_blocks(importance, plan.rank_bias(tile), plan.spec.selected)


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _branches(plan: Plan, tile: Tile, chosen: Tensor | None) -> list[tuple[int, slice, Tensor]]:
    """Branches that see anything: number, columns (compressed slots, slots, tokens), mask."""
    out = [
        (1, plan.selected_columns(tile), plan.selected_mask(tile, chosen)),
        (2, slice(tile.window, tile.end), plan.window_mask(tile)),
    ]
    if not tile.blind:
        out.append((0, plan.compressed_columns(tile), plan.compressed_mask(tile)))
    return out


class _BlockedNsa(torch.autograd.Function):
    """The three branches and their gated sum, from compressed keys and values."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THD: Tensor,
        kc: Tensor,
        vc: Tensor,
        ks: Tensor,
        vs: Tensor,
        kw: Tensor,
        vw: Tensor,
        gates_TH3: Tensor,
        plan: Plan,
        scale: float,
        first: int,
        distances: list[Tensor] | None,
    ) -> Tensor:
        T, H, _ = q_THD.shape
        G, E = kw.shape[1], vw.shape[2]
        slots = plan.token_of_slot
        keys = ((kc, vc), (ks.index_select(0, slots), vs.index_select(0, slots)), (kw, vw))
        wide = _wide_dtype(q_THD)
        q_GRTD = _by_group(q_THD, G)
        gates_GRT3 = _by_group(gates_TH3, G).to(wide)
        total = torch.zeros(T, H, E, dtype=wide, device=q_THD.device)
        total_GRTE = _by_group(total, G)
        outs: list[Tensor] = []
        lses: list[Tensor] = []
        chosen: list[Tensor] = []
        for tile in plan.tiles_from(first):
            rows = slice(tile.begin - first, tile.end - first)
            q_GRBD = q_GRTD[:, :, rows]
            picked = _select(q_GRBD, kc, plan, tile, scale) if tile.scored else None
            if picked is not None:
                chosen.append(picked)
            if distances is not None:
                distances.append(_distance(plan, tile, picked, G))
            for branch, columns, mask in _branches(plan, tile, picked):
                k, v = keys[branch]
                out, lse = attend(q_GRBD, k[columns], v[columns], mask.to(wide), scale)
                total_GRTE[:, :, rows].addcmul_(out, gates_GRT3[:, :, rows, branch, None])
                outs.append(out)
                lses.append(lse)
        ctx.save_for_backward(q_THD, kc, vc, ks, vs, kw, vw, gates_TH3, *outs, *lses, *chosen)
        ctx.plan, ctx.scale, ctx.first, ctx.parts = plan, scale, first, len(outs)
        return total.to(q_THD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_THE: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        first: int = ctx.first
        q_THD, kc, vc, ks, vs, kw, vw, gates_TH3, *saved = ctx.saved_tensors
        outs, lses = iter(saved[: ctx.parts]), iter(saved[ctx.parts : 2 * ctx.parts])
        chosen = iter(saved[2 * ctx.parts :])
        G = kw.shape[1]
        wide = _wide_dtype(q_THD)
        slots = plan.token_of_slot
        keys = ((kc, vc), (ks.index_select(0, slots), vs.index_select(0, slots)), (kw, vw))
        q_GRTD, grad_GRTE = _by_group(q_THD, G), _by_group(grad_THE.contiguous(), G)
        gates_GRT3 = _by_group(gates_TH3, G)
        dq, dgates = (torch.zeros_like(x, dtype=wide) for x in (q_THD, gates_TH3))
        dq_GRTD, dgates_GRT3 = _by_group(dq, G), _by_group(dgates, G)
        dkv = [[torch.zeros_like(x, dtype=wide) for x in pair] for pair in keys]
        for tile in plan.tiles_from(first):
            rows = slice(tile.begin - first, tile.end - first)
            q_GRBD, grad_GRBE = q_GRTD[:, :, rows], grad_GRTE[:, :, rows]
            picked = next(chosen) if tile.scored else None
            for branch, columns, mask in _branches(plan, tile, picked):
                k, v = keys[branch]
                out = next(outs)
                dgates_GRT3[:, :, rows, branch] = (grad_GRBE * out).sum(-1, dtype=wide)
                dq_tile, dk, dv = attend_backward(
                    grad_GRBE * gates_GRT3[:, :, rows, branch, None].to(grad_GRBE.dtype),
                    q_GRBD,
                    k[columns],
                    v[columns],
                    out,
                    next(lses),
                    mask.to(wide),
                    ctx.scale,
                )
                dq_GRTD[:, :, rows].add_(dq_tile)
                dkv[branch][0][columns].add_(dk)
                dkv[branch][1][columns].add_(dv)
        # Slots that repeat a document's last token were seen by no query: their gradient is 0.
        dkv[1] = [x.index_select(0, plan.slot_of_token) for x in dkv[1]]
        inputs = (q_THD, kc, vc, ks, vs, kw, vw, gates_TH3)
        gradients = (dq, *dkv[0], *dkv[1], *dkv[2], dgates)
        cast = [g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)]
        return (*cast, None, None, None, None)


def _by_group(x_THD: Tensor, groups: int) -> Tensor:
    """View [T, H, D] as [G, R, T, D]."""
    T, H, D = x_THD.shape
    return x_THD.view(T, groups, H // groups, D).permute(1, 2, 0, 3)


def _distance(plan: Plan, tile: Tile, chosen_GBJ: Tensor | None, groups: int) -> Tensor:
    """Sum of distances to the selected blocks that are not forced, and their number: fp32 [2]."""
    allowed, forced = plan.blocks_of(tile)
    free = (allowed.expand(groups, -1, -1) if chosen_GBJ is None else chosen_GBJ) & ~forced
    return torch.stack([(plan.block_distance(tile) * free).sum(), free.sum().float()])


def nsa_blocked(
    call: NsaCall,
    *,
    scale: float | None = None,
    first: int = 0,
    stats: dict[str, Tensor] | None = None,
) -> Tensor:
    """Native Sparse Attention in tiles; result and options as in `api.nsa_attention`.

    Scores, softmax and sums are fp32 (fp64 for fp64 inputs) whatever the input dtype.
    """
    _, H, D = call.q_THD.shape
    scale = D**-0.5 if scale is None else scale
    plan = plan_for(call.docs, call.spec, H)
    distances: list[Tensor] | None = None if stats is None else []
    out: Tensor = _BlockedNsa.apply(  # type: ignore[no-untyped-call]
        call.q_THD.contiguous(),
        compress(call.k_cmp, call.phi_k, plan, keys=True),
        compress(call.v_cmp, call.phi_v, plan),
        call.k_slc,
        call.v_slc,
        call.k_win,
        call.v_win,
        call.gates_TH3.contiguous(),
        plan,
        scale,
        first,
        distances,
    )
    if stats is not None and distances is not None:
        total, count = torch.stack(distances).sum(0)
        stats["selected_distance"] = total / count.clamp(min=1)
    return out


def selected_blocks(call: NsaCall, *, scale: float | None = None) -> Tensor:
    """Choose as `nsa_blocked` does: for those who judge the choice.

    Returns:
        int64 [T, G, K]: pack-wide index of each selected block, ascending, -1 where there is none.
    """
    H, D = call.q_THD.shape[1:]
    G = call.k_cmp.shape[1]
    scale = D**-0.5 if scale is None else scale
    plan = plan_for(call.docs, call.spec, H)
    with torch.no_grad():
        k_NGD = compress(call.k_cmp, call.phi_k, plan, keys=True)
        q_GRTD = _by_group(call.q_THD.contiguous(), G)
        parts = []
        for tile in plan.tiles:
            if tile.scored:
                chosen = _select(q_GRTD[:, :, tile.begin : tile.end], k_NGD, plan, tile, scale)
            else:
                chosen = plan.blocks_of(tile)[0].expand(G, -1, -1)
            parts.append(
                block_indices(chosen.transpose(0, 1), tile.block_begin, call.spec.selected)
            )
    return torch.cat(parts)
