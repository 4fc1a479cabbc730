"""Who fires, in two launches: scores, thresholds, gates and exploration; then the sorted pair list.

`route` does for a block of tokens everything that `router.py` says about a row of the
[T, E] tables, in registers: x is read once and no fp32 copy of it exists. The product with the
directions takes bf16 values as they are (their products are exact in fp32 and accumulate there);
fp32 inputs go through an IEEE product.

`place` sorts the pairs by expert without a sort and without atomics: every block of tokens counts
its pairs per expert (in `route`), and a block's first place is the sum over the blocks before it.
Groups start at multiples of `align`; padding rows belong to token -1.

Shapes: T tokens, E experts, C width, P rows (capacity), K slots of a token, N blocks of tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.experts.spec import RouteSpec


def _tile(experts: int) -> tuple[int, int, int]:
    """Tokens and columns of one program, and its warps: a [T, E] tile that fits into registers."""
    block_e = max(16, triton.next_power_of_2(experts))
    return max(16, min(64, 4096 // block_e)), block_e, (4 if block_e <= 256 else 8)


class Routing(NamedTuple):
    """What `route` and `place` decided for a batch; nothing in it carries a gradient.

    Attributes:
        s_TE: cosines, fp32.
        z_TE: logits that weigh, fp32.
        p_TE: gates, fp32; 0 where an expert did not fire.
        state_TE: int8; 1 fired, 2 explored, 0 neither.
        x_inv_T: 1 / |x|, fp32; 0 for a zero row.
        w_inv_E: 1 / |direction|, fp32.
        place_TE: row of the pair, int32; -1 where nothing runs.
        slot_TK: rows of a token's pairs by rising expert, int32; -1 in unused slots.
        gate_TK: gates of those rows, fp32; 0 in unused slots.
        token_P: token of every row, int32; -1 in padding; undefined behind the last group.
        gate_P: gate of every row, fp32; 0 in padding.
        ends_E: last row + 1 of every group, a multiple of `align`, int32.
    """

    s_TE: Tensor
    z_TE: Tensor
    p_TE: Tensor
    state_TE: Tensor
    x_inv_T: Tensor
    w_inv_E: Tensor
    place_TE: Tensor
    slot_TK: Tensor
    gate_TK: Tensor
    token_P: Tensor
    gate_P: Tensor
    ends_E: Tensor


@triton.jit
def _explored_column(seed, fired, biased, columns, E):  # type: ignore[no-untyped-def]
    """Column of the largest hash among the experts that did not fire, and that hash (-1: none)."""
    mixed = (seed[:, None] + 40503 * (columns + 1).to(tl.int64)[None, :]) & 0x7FFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x297A2D39) & 0x7FFFFFFF
    mixed = mixed ^ (mixed >> 15)
    # See CLOSED_Z in router.py.
    open_ = (columns < E)[None, :] & (fired == 0) & (biased >= -1e3)
    score = tl.where(open_, mixed, -1).to(tl.int32)
    return tl.max(score, axis=1), tl.argmax(score, axis=1)


@triton.jit  # type: ignore[untyped-decorator]
def _route_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915
    x_ptr,
    w_ptr,
    log_tau_ptr,
    theta_ptr,
    bias_ptr,
    step_ptr,
    s_ptr,
    z_ptr,
    p_ptr,
    state_ptr,
    x_inv_ptr,
    w_inv_ptr,
    count_ptr,
    T,
    tau_0,
    theta_0,
    stride,
    first,
    sequence,
    C: tl.constexpr,
    E: tl.constexpr,
    FEWEST: tl.constexpr,
    MOST: tl.constexpr,
    BIAS_WEIGHS: tl.constexpr,
    EXPLORE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    pid = tl.program_id(0)
    rows = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_E)
    row_mask, column_mask = rows < T, columns < E
    channels = tl.arange(0, BLOCK_C)
    x_at = x_ptr + rows.to(tl.int64)[:, None] * C + channels[None, :]
    w_at = w_ptr + columns[:, None] * C + channels[None, :]
    dot = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    x_sq = tl.zeros([BLOCK_T], dtype=tl.float32)
    w_sq = tl.zeros([BLOCK_E], dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        inside = (c + channels < C)[None, :]
        x = tl.load(x_at + c, mask=row_mask[:, None] & inside, other=0.0)
        w = tl.load(w_at + c, mask=column_mask[:, None] & inside, other=0.0)
        x_wide, w_wide = x.to(tl.float32), w.to(tl.float32)
        x_sq += tl.sum(x_wide * x_wide, axis=1)
        w_sq += tl.sum(w_wide * w_wide, axis=1)
        if HALF:
            dot = tl.dot(x, tl.trans(w), dot)
        else:
            dot = tl.dot(x_wide, tl.trans(w_wide), dot, input_precision="ieee")
    x_norm, w_norm = tl.sqrt(x_sq), tl.sqrt(w_sq)
    x_inv = tl.where(x_norm > 1e-20, 1.0 / tl.maximum(x_norm, 1e-20), 0.0)
    w_inv = tl.where(w_norm > 1e-20, 1.0 / tl.maximum(w_norm, 1e-20), 0.0)
    s = dot * x_inv[:, None] * w_inv[None, :]
    tau = tau_0 * tl.exp(tl.load(log_tau_ptr).to(tl.float32))
    theta = theta_0 + tl.load(theta_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=column_mask, other=0.0).to(tl.float32)
    z = tau * s - theta[None, :]
    biased = z - bias[None, :]
    if BIAS_WEIGHS:
        z = biased

    rest = tl.where(column_mask[None, :], biased, -float("inf"))
    fired = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.int32)
    for k in range(MOST):
        best = tl.max(rest, axis=1)
        here = columns[None, :] == tl.argmax(rest, axis=1)[:, None]
        fires = (best > 0) | (k < FEWEST)
        fired = tl.where(here & fires[:, None], 1, fired)
        rest = tl.where(here, -float("inf"), rest)

    top = tl.max(tl.where(fired == 1, z, -float("inf")), axis=1)
    weight = tl.where(fired == 1, tl.exp(z - top[:, None]), 0.0)
    p = weight / tl.sum(weight, axis=1)[:, None]
    state = fired
    if EXPLORE:
        step = tl.load(step_ptr)
        index = ((rows + first) % sequence).to(tl.int64)
        seed = index * 0x9E3779B1 + step * 0x85EBCA6B
        hash_, column = _explored_column(seed, fired, biased, columns, E)
        explores = (index % stride == (step * 2654435761) % stride) & (hash_ >= 0)
        state = tl.where(explores[:, None] & (columns[None, :] == column[:, None]), 2, state)
    state = tl.where(row_mask[:, None] & column_mask[None, :], state, 0)

    mask = row_mask[:, None] & column_mask[None, :]
    at = rows.to(tl.int64)[:, None] * E + columns[None, :]
    tl.store(s_ptr + at, s, mask=mask)
    tl.store(z_ptr + at, z, mask=mask)
    tl.store(p_ptr + at, p, mask=mask)
    tl.store(state_ptr + at, state.to(tl.int8), mask=mask)
    tl.store(x_inv_ptr + rows, x_inv, mask=row_mask)
    if pid == 0:
        tl.store(w_inv_ptr + columns, w_inv, mask=column_mask)
    count = tl.sum((state > 0).to(tl.int32), axis=0)
    tl.store(count_ptr + pid * E + columns, count, mask=column_mask)


@triton.jit  # type: ignore[untyped-decorator]
def _place_kernel(  # type: ignore[no-untyped-def]
    state_ptr,
    p_ptr,
    count_ptr,
    place_ptr,
    slot_ptr,
    slot_gate_ptr,
    token_ptr,
    gate_ptr,
    end_ptr,
    T,
    N,
    E: tl.constexpr,
    K: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    columns = tl.arange(0, BLOCK_E)
    column_mask = columns < E
    total = tl.zeros([BLOCK_E], dtype=tl.int32)
    before = tl.zeros([BLOCK_E], dtype=tl.int32)
    for n in range(0, N, BLOCK_N):
        blocks = n + tl.arange(0, BLOCK_N)
        count = tl.load(
            count_ptr + blocks[:, None] * E + columns[None, :],
            mask=(blocks < N)[:, None] & column_mask[None, :],
            other=0,
        )
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where((blocks < pid)[:, None], count, 0), axis=0)
    room = ((total + ALIGN - 1) // ALIGN) * ALIGN
    end = tl.cumsum(room, axis=0)
    start = end - room
    if pid == 0:
        tl.store(end_ptr + columns, end, mask=column_mask)

    rows = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    row_mask = rows < T
    at = rows.to(tl.int64)[:, None] * E + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    runs = (tl.load(state_ptr + at, mask=mask, other=0) > 0).to(tl.int32)
    p = tl.load(p_ptr + at, mask=mask, other=0.0)
    place = (start + before)[None, :] + tl.cumsum(runs, axis=0) - runs
    slot = tl.cumsum(runs, axis=1) - runs
    ran = runs > 0
    tl.store(place_ptr + at, tl.where(ran, place, -1), mask=mask)
    tokens = tl.broadcast_to(rows[:, None], (BLOCK_T, BLOCK_E))
    tl.store(token_ptr + place, tokens, mask=ran)
    tl.store(gate_ptr + place, p, mask=ran)
    slot_at = rows.to(tl.int64)[:, None] * K + slot
    tl.store(slot_ptr + slot_at, place, mask=ran)
    tl.store(slot_gate_ptr + slot_at, p, mask=ran)
    # The slots behind a token's last pair: other addresses than those just written.
    places = tl.arange(0, BLOCK_K)
    unused = (places[None, :] >= tl.sum(runs, axis=1)[:, None]) & (places < K)[None, :]
    unused_at = rows.to(tl.int64)[:, None] * K + places[None, :]
    nothing = tl.full([BLOCK_T, BLOCK_K], -1, dtype=tl.int32)
    tl.store(slot_ptr + unused_at, nothing, mask=unused & row_mask[:, None])
    tl.store(slot_gate_ptr + unused_at, nothing * 0.0, mask=unused & row_mask[:, None])

    if ALIGN > 1:
        lanes = tl.arange(0, ALIGN)
        for e in range(pid, E, tl.num_programs(0)):
            first = tl.sum(tl.where(columns == e, start + total, 0), axis=0)
            last = tl.sum(tl.where(columns == e, end, 0), axis=0)
            inside = first + lanes < last
            tl.store(token_ptr + first + lanes, lanes * 0 - 1, mask=inside)
            tl.store(gate_ptr + first + lanes, lanes * 0.0, mask=inside)


def route_triton(
    x_TC: Tensor,
    direction_EC: Tensor,
    log_tau: Tensor,
    theta_E: Tensor,
    bias_E: Tensor,
    step_1: Tensor,
    first: int,
    spec: RouteSpec,
    align: int,
) -> Routing:
    """Decide for every token which experts run and where their pairs lie.

    Args:
        x_TC: tokens, bf16 or fp32, contiguous, at least one.
        direction_EC: the experts' directions, bf16 or fp32, contiguous.
        log_tau: [1].
        theta_E: learned thresholds on top of theta_0.
        bias_E: the controller's bias, fp32.
        step_1: int64 [1]; decides, with a token's index in its sequence, who explores what.
        first: index of the first token in the pass, which ranks may share.
        spec: how experts are chosen.
        align: groups start at multiples of it, a power of two.
    """
    (T, C), E = x_TC.shape, direction_EC.shape[0]
    block_t, block_e, warps = _tile(E)
    N, K = triton.cdiv(T, block_t), spec.slots(E)
    P = spec.capacity(T, E, align)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x_TC.device)

    s_TE, z_TE, p_TE = empty(3, T, E).unbind()
    x_inv_T, w_inv_E = empty(T), empty(E)
    state_TE = empty(T, E, dtype=torch.int8)
    count_NE, end_E = empty(N, E, dtype=torch.int32), empty(E, dtype=torch.int32)
    place_TE, slot_TK = empty(T, E, dtype=torch.int32), empty(T, K, dtype=torch.int32)
    gate_TK, gate_P, token_P = empty(T, K), empty(P), empty(P, dtype=torch.int32)
    half = x_TC.dtype == torch.bfloat16 and direction_EC.dtype == torch.bfloat16
    _route_kernel[(N,)](
        x_TC, direction_EC, log_tau, theta_E, bias_E, step_1,
        s_TE, z_TE, p_TE, state_TE, x_inv_T, w_inv_E, count_NE,
        T, spec.tau_0, spec.theta_0, max(spec.stride, 1), first,
        spec.sequence or first + T,
        C=C, E=E, FEWEST=min(spec.fewest, E), MOST=min(spec.most, E),
        BIAS_WEIGHS=spec.bias_weighs, EXPLORE=spec.stride > 0, HALF=half,
        BLOCK_T=block_t, BLOCK_C=64 if block_e <= 128 else 32, BLOCK_E=block_e,
        num_warps=warps, num_stages=3,
    )  # fmt: skip
    _place_kernel[(N,)](
        state_TE, p_TE, count_NE, place_TE, slot_TK, gate_TK, token_P, gate_P, end_E,
        T, N, E=E, K=K, ALIGN=align, BLOCK_T=block_t, BLOCK_E=block_e,
        BLOCK_K=triton.next_power_of_2(K), BLOCK_N=max(16, 4096 // block_e),
        num_warps=warps,
    )  # fmt: skip
    return Routing(
        s_TE, z_TE, p_TE, state_TE, x_inv_T, w_inv_E, place_TE, slot_TK, gate_TK, token_P, gate_P,
        end_E,
    )  # fmt: skip
