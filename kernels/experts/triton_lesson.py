"""The backward of everything on [T, E] in one launch, and the directions' gradient in two more.

`_lesson_kernel` takes a block of tokens and, in registers: Surprise of every pair that ran, the
target, belief and gradient of the router's lesson (surprise.py), the straight-through backward of
the gates (`fired_softmax` in router.py), thresholds, temperature and the cosines. What is
summed over tokens leaves as one partial row per block; `_finish_kernel` adds those in order.

Shapes: T tokens, E experts, C width, P rows, N blocks of tokens, S splits over tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.experts.spec import LayerSpec
from kernels.experts.surprise import SurpriseSpec
from kernels.experts.triton_activation import HiddenRows
from kernels.experts.triton_route import Routing

SUMS = 4
"""Partial rows per block: of dz, of ds * s, fired tokens, and their surprise."""
TOTALS = 4
"""Partial scalars per block: router loss, tokens taught, tokens in agreement, and one spare."""


class RouterGrads(NamedTuple):
    """Gradients of the router and what was counted on the way.

    Attributes:
        a_TE: gradient of the cosines times both inverse norms, fp32.
        centre_T: sum over experts of gradient * cosine, times 1 / |x|^2, fp32.
        sums_N4E: partial sums over blocks of tokens; see SUMS.
        totals_N4: partial scalars; see TOTALS.
    """

    a_TE: Tensor
    centre_T: Tensor
    sums_N4E: Tensor
    totals_N4: Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _lesson_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915
    s_ptr, z_ptr, p_ptr, state_ptr, x_inv_ptr, w_inv_ptr, place_ptr,
    dp_ptr, h_sq_ptr, dinner_sq_ptr, g_norm_ptr, unit_ptr, log_tau_ptr,
    a_ptr, centre_ptr, sums_ptr, totals_ptr, T, P,
    tau_0, inverse_width, temperature, kl_weight, ce_weight, coefficient,
    E: tl.constexpr, PARTS: tl.constexpr, TEACH: tl.constexpr, NORMS: tl.constexpr,
    GATED: tl.constexpr, RELATIVE: tl.constexpr, SURROGATE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    rows = pid * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = tl.arange(0, BLOCK_E)
    row_mask, column_mask = rows < T, columns < E
    mask = row_mask[:, None] & column_mask[None, :]
    at = rows.to(tl.int64)[:, None] * E + columns[None, :]
    s = tl.load(s_ptr + at, mask=mask, other=0.0)
    z = tl.load(z_ptr + at, mask=mask, other=0.0)
    p = tl.load(p_ptr + at, mask=mask, other=0.0)
    state = tl.load(state_ptr + at, mask=mask, other=0)
    place = tl.load(place_ptr + at, mask=mask, other=-1)
    x_inv = tl.load(x_inv_ptr + rows, mask=row_mask, other=0.0)
    w_inv = tl.load(w_inv_ptr + columns, mask=column_mask, other=0.0)
    fired, runs = state == 1, state > 0
    dp = tl.load(dp_ptr + place, mask=runs, other=0.0)
    for part in range(1, PARTS):
        dp += tl.load(dp_ptr + part * P.to(tl.int64) + place, mask=runs, other=0.0)

    # Of every expert beside the fired ones: exp(z) / sum over fired exp(z).
    top = tl.max(tl.where(fired, z, -float("inf")), axis=1)
    top = tl.where(row_mask, top, 0.0)
    total = tl.sum(tl.where(fired, tl.exp(z - top[:, None]), 0.0), axis=1)
    total = tl.where(row_mask, total, 1.0)
    share = tl.where(mask, tl.exp(z - top[:, None]) / total[:, None], 0.0)

    gain = tl.where(mask, dp - tl.sum(p * dp, axis=1)[:, None], 0.0)
    dz = p * gain
    if SURROGATE:
        soft = tl.sigmoid(z * inverse_width)
        near = share * soft * (1.0 - soft) * inverse_width
        near_total = tl.maximum(tl.sum(near, axis=1), 1e-30)
        near_gain = tl.sum(near * gain, axis=1) / near_total
        dz += near * (gain - near_gain[:, None])

    loss_total, taught_total, agree_total = 0.0, 0.0, 0.0
    surprise = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    if TEACH:
        unit = tl.load(unit_ptr)
        g = tl.load(g_norm_ptr + rows, mask=row_mask, other=0.0) / unit
        if NORMS:
            h_sq = tl.load(h_sq_ptr + place, mask=runs, other=0.0)
            dinner_sq = tl.load(dinner_sq_ptr + place, mask=runs, other=0.0)
            for part in range(1, PARTS):
                part_at = part * P.to(tl.int64) + place
                h_sq += tl.load(h_sq_ptr + part_at, mask=runs, other=0.0)
                dinner_sq += tl.load(dinner_sq_ptr + part_at, mask=runs, other=0.0)
            x_norm = tl.where(x_inv > 0, 1.0 / x_inv, 0.0)
            surprise = tl.sqrt((g * g)[:, None] * h_sq + dinner_sq * (x_norm * x_norm)[:, None])
        else:
            surprise = tl.where(mask, g[:, None], 0.0)
        if GATED:
            surprise *= tl.where(fired, p, share / (1.0 + share))
        count = tl.sum(runs.to(tl.float32), axis=1)
        mean = tl.sum(tl.where(runs, surprise, 0.0), axis=1) / tl.maximum(count, 1.0)
        taught = (count >= 2) & (mean > 0) & (mean < float("inf"))
        cost = tl.where(runs, surprise, float("inf"))
        best = columns[None, :] == tl.argmin(cost, axis=1)[:, None]
        scale = tl.zeros_like(mean) + temperature
        if RELATIVE:
            scale *= tl.where(taught, mean, 1.0)
        least = tl.where(taught, tl.min(cost, axis=1), 0.0)
        target = tl.where(runs, tl.exp(-(cost - least[:, None]) / scale[:, None]), 0.0)
        target = target / tl.maximum(tl.sum(target, axis=1), 1e-30)[:, None]
        highest = tl.max(tl.where(runs, z, -float("inf")), axis=1)
        highest = tl.where(row_mask, highest, 0.0)
        belief = tl.where(runs, tl.exp(z - highest[:, None]), 0.0)
        belief = belief / tl.maximum(tl.sum(belief, axis=1), 1e-30)[:, None]
        lesson = (kl_weight + ce_weight) * belief - kl_weight * target
        lesson -= tl.where(best, ce_weight, 0.0)
        dz += tl.where(runs & taught[:, None], lesson, 0.0) * (coefficient * unit)

        log_belief = tl.log(tl.maximum(belief, 1e-30))
        log_target = tl.log(tl.maximum(target, 1e-30))
        kl = tl.sum(tl.where(runs, target * (log_target - log_belief), 0.0), axis=1)
        ce = -tl.sum(tl.where(best, log_belief, 0.0), axis=1)
        loss_total = tl.sum(tl.where(taught, kl_weight * kl + ce_weight * ce, 0.0), axis=0)
        taught_total = tl.sum(taught.to(tl.float32), axis=0)
        believed = columns[None, :] == tl.argmax(belief, axis=1)[:, None]
        agrees = tl.max((believed & best).to(tl.int32), axis=1) > 0
        agree_total = tl.sum((agrees & taught).to(tl.float32), axis=0)

    tau = tau_0 * tl.exp(tl.load(log_tau_ptr).to(tl.float32))
    ds = dz * tau
    ds_s = ds * s
    a = ds * x_inv[:, None] * w_inv[None, :]
    tl.store(a_ptr + at, a, mask=mask)
    tl.store(centre_ptr + rows, tl.sum(ds_s, axis=1) * x_inv * x_inv, mask=row_mask)
    sums_at = sums_ptr + pid * 4 * E + columns
    tl.store(sums_at, tl.sum(dz, axis=0), mask=column_mask)
    tl.store(sums_at + E, tl.sum(ds_s, axis=0), mask=column_mask)
    tl.store(sums_at + 2 * E, tl.sum(fired.to(tl.float32), axis=0), mask=column_mask)
    tl.store(sums_at + 3 * E, tl.sum(tl.where(fired, surprise, 0.0), axis=0), mask=column_mask)
    tl.store(totals_ptr + pid * 4, loss_total)
    tl.store(totals_ptr + pid * 4 + 1, taught_total)
    tl.store(totals_ptr + pid * 4 + 2, agree_total)


def lesson_triton(
    routing: Routing,
    hidden: HiddenRows,
    g_norm_T: Tensor | None,
    unit: Tensor | None,
    log_tau: Tensor,
    spec: LayerSpec,
) -> RouterGrads:
    """Gradients of the router from dp and Surprise of the pairs that ran.

    Args:
        routing: what ran.
        hidden: dp and the squared norms by row, [P], or in parts to be added up, [parts, P].
        g_norm_T: |g| of every token, fp32; needed with Surprise.
        unit: the loss scale, 0-dim fp32; needed with Surprise.
        log_tau: [1].
        spec: what to learn.
    """
    T, E = routing.s_TE.shape
    block_e = max(16, triton.next_power_of_2(E))
    # About ten [T, E] tiles are alive at once.
    block_t = max(8, min(32, 2048 // block_e))
    N = triton.cdiv(T, block_t)
    teach = spec.surprise
    known = teach if teach is not None else SurpriseSpec()
    device = routing.s_TE.device
    out = RouterGrads(
        torch.empty_like(routing.s_TE),
        torch.empty(T, dtype=torch.float32, device=device),
        torch.empty(N, SUMS, E, dtype=torch.float32, device=device),
        torch.empty(N, TOTALS, dtype=torch.float32, device=device),
    )
    width = spec.surrogate_width
    _lesson_kernel[(N,)](
        routing.s_TE, routing.z_TE, routing.p_TE, routing.state_TE, routing.x_inv_T,
        routing.w_inv_E, routing.place_TE, hidden.dp_P, hidden.h_sq_P, hidden.dinner_sq_P,
        g_norm_T, unit, log_tau, *out, T, hidden.dp_P.shape[-1],
        spec.route.tau_0, 1.0 / width if width > 0 else 0.0,
        known.temperature, known.kl_weight, known.ce_weight, known.coefficient,
        E=E, PARTS=hidden.dp_P.numel() // hidden.dp_P.shape[-1], TEACH=teach is not None,
        NORMS=known.kind == "param_grad", GATED=known.gated,
        RELATIVE=known.normalise == "mean", SURROGATE=width > 0,
        BLOCK_T=block_t, BLOCK_E=block_e, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _direction_kernel(  # type: ignore[no-untyped-def]
    a_ptr, x_ptr, part_ptr, T, chunk,
    C: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    experts = tl.arange(0, BLOCK_E)
    column_mask, expert_mask = columns < C, experts < E
    total = tl.zeros([BLOCK_E, BLOCK_C], dtype=tl.float32)
    for first in range(split * chunk, min(split * chunk + chunk, T), BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        token_mask = tokens < T
        # Transposed by its addresses: a is small, and no accumulator becomes an operand.
        a = tl.load(
            a_ptr + tokens.to(tl.int64)[None, :] * E + experts[:, None],
            mask=token_mask[None, :] & expert_mask[:, None],
            other=0.0,
        )
        x = tl.load(
            x_ptr + tokens.to(tl.int64)[:, None] * C + columns[None, :],
            mask=token_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        if HALF:
            high = a.to(tl.bfloat16)
            low = (a - high.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(low, x, total)
            total = tl.dot(high, x, total)
        else:
            total = tl.dot(a, x.to(tl.float32), total, input_precision="ieee")
    at = (split * E + experts)[:, None] * C + columns[None, :]
    tl.store(part_ptr + at, total, mask=expert_mask[:, None] & column_mask[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _finish_kernel(  # type: ignore[no-untyped-def]
    part_ptr, w_ptr, w_inv_ptr, sums_ptr, totals_ptr, counter_ptr,
    dw_ptr, dtheta_ptr, dlog_tau_ptr, expert_surprise_ptr, scalars_ptr, T, N,
    C: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    expert_mask = experts < E
    ds_s = tl.zeros([BLOCK_E], dtype=tl.float32)
    dz = tl.zeros([BLOCK_E], dtype=tl.float32)
    fired = tl.zeros([BLOCK_E], dtype=tl.float32)
    surprise = tl.zeros([BLOCK_E], dtype=tl.float32)
    loss, taught, agree = 0.0, 0.0, 0.0
    for n in range(0, N, BLOCK_N):
        blocks = n + tl.arange(0, BLOCK_N)
        block_mask = blocks < N
        mask = block_mask[:, None] & expert_mask[None, :]
        sums_at = sums_ptr + blocks[:, None] * 4 * E + experts[None, :]
        ds_s += tl.sum(tl.load(sums_at + E, mask=mask, other=0.0), axis=0)
        if pid == 0:
            dz += tl.sum(tl.load(sums_at, mask=mask, other=0.0), axis=0)
            fired += tl.sum(tl.load(sums_at + 2 * E, mask=mask, other=0.0), axis=0)
            surprise += tl.sum(tl.load(sums_at + 3 * E, mask=mask, other=0.0), axis=0)
            total_at = totals_ptr + blocks * 4
            loss += tl.sum(tl.load(total_at, mask=block_mask, other=0.0), axis=0)
            taught += tl.sum(tl.load(total_at + 1, mask=block_mask, other=0.0), axis=0)
            agree += tl.sum(tl.load(total_at + 2, mask=block_mask, other=0.0), axis=0)

    columns = pid * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = expert_mask[:, None] & (columns < C)[None, :]
    at = experts[:, None] * C + columns[None, :]
    total = tl.zeros([BLOCK_E, BLOCK_C], dtype=tl.float32)
    for split in range(SPLITS):
        total += tl.load(part_ptr + split * E * C + at, mask=mask, other=0.0)
    w = tl.load(w_ptr + at, mask=mask, other=0.0).to(tl.float32)
    w_inv = tl.load(w_inv_ptr + experts, mask=expert_mask, other=0.0)
    total -= w * (ds_s * w_inv * w_inv)[:, None]
    tl.store(dw_ptr + at, total.to(dw_ptr.dtype.element_ty), mask=mask)

    if pid == 0:
        tl.store(dtheta_ptr + experts, (-dz).to(dtheta_ptr.dtype.element_ty), mask=expert_mask)
        dlog_tau = tl.sum(ds_s, axis=0)
        tl.store(dlog_tau_ptr, dlog_tau.to(dlog_tau_ptr.dtype.element_ty))
        tl.store(expert_surprise_ptr + experts, surprise / fired, mask=expert_mask)
        fired_total = tl.sum(fired, axis=0)
        tl.store(scalars_ptr, tl.sum(surprise, axis=0) / tl.maximum(fired_total, 1.0))
        tl.store(scalars_ptr + 1, loss / tl.maximum(taught, 1.0))
        tl.store(scalars_ptr + 2, agree / tl.maximum(taught, 1.0))
        if COUNT:
            counter_at = counter_ptr + experts
            count = tl.load(counter_at, mask=expert_mask, other=0) + fired.to(tl.int64)
            tl.store(counter_at, count, mask=expert_mask)
            tl.store(counter_ptr + E, tl.load(counter_ptr + E) + T)


class DirectionGrads(NamedTuple):
    """Gradients of the router's own parameters, and what is shown.

    Attributes:
        ddirection_EC: dtype of the directions.
        dtheta_E: dtype of theta.
        dlog_tau_1: dtype of log_tau.
        expert_surprise_E: mean S over the tokens an expert fired for; NaN for none.
        scalars_3: surprise over all fired pairs, router loss, agreement.
    """

    ddirection_EC: Tensor
    dtheta_E: Tensor
    dlog_tau_1: Tensor
    expert_surprise_E: Tensor
    scalars_3: Tensor


def direction_grads_triton(
    grads: RouterGrads,
    x_TC: Tensor,
    direction_EC: Tensor,
    theta_E: Tensor,
    log_tau: Tensor,
    w_inv_E: Tensor,
    counts_X: Tensor | None,
) -> DirectionGrads:
    """Sum over tokens what the router's parameters get; adds the fired tokens to `counts_X`."""
    (T, C), E = x_TC.shape, direction_EC.shape[0]
    block_e = max(16, triton.next_power_of_2(E))
    block_c = min(64, max(16, triton.next_power_of_2(C)))
    # About 2,048 tokens a split, in whole blocks, whatever the device: the order of the sum is
    # part of the result.
    splits = max(1, min(32, T // 2048))
    chunk = triton.cdiv(triton.cdiv(T, splits), 64) * 64
    device = x_TC.device
    part_SEC = torch.empty(splits, E, C, dtype=torch.float32, device=device)
    half = x_TC.dtype == torch.bfloat16
    warps = 4 if block_e <= 64 else 8
    _direction_kernel[(triton.cdiv(C, block_c), splits)](
        grads.a_TE, x_TC, part_SEC, T, chunk, C=C, E=E, HALF=half,
        BLOCK_T=64, BLOCK_C=block_c, BLOCK_E=block_e, num_warps=warps,
    )  # fmt: skip
    out = DirectionGrads(
        torch.empty_like(direction_EC),
        torch.empty_like(theta_E),
        torch.empty_like(log_tau),
        torch.empty(E, dtype=torch.float32, device=device),
        torch.empty(3, dtype=torch.float32, device=device),
    )
    N = grads.sums_N4E.shape[0]
    _finish_kernel[(triton.cdiv(C, block_c),)](
        part_SEC, direction_EC, w_inv_E, grads.sums_N4E, grads.totals_N4, counts_X, *out, T, N,
        C=C, E=E, SPLITS=splits, COUNT=counts_X is not None,
        BLOCK_C=block_c, BLOCK_E=block_e, BLOCK_N=max(16, 4096 // block_e), num_warps=warps,
    )  # fmt: skip
    return out
