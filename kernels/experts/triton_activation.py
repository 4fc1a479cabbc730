"""The hidden non-linearity over pair rows, forward, and backward with everything that needs a row.

The backward reads inner and dh once and writes what both weight gradients need, gates included, and
per row dp = dh . h and the two squared norms of Surprise. Rows behind the last group are neither
read nor written: programs walk over the rows up to the end that they read on the device.

Shapes: P rows, F hidden, I inner (swiglu 2F, relu2 F), T tokens, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.experts.activation import Activation


@triton.jit  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    inner_ptr, delta_ptr, token_ptr, end_ptr, h_ptr,
    E: tl.constexpr, F: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    used = tl.load(end_ptr + E - 1)
    columns = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    column_mask = (columns < F)[None, :]
    inner_width = 2 * F if GATED else F
    for first in range(tl.program_id(0) * BLOCK_R, used, tl.num_programs(0) * BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        wide = rows.to(tl.int64)[:, None]
        mask = (rows < used)[:, None] & column_mask
        at = inner_ptr + wide * inner_width + columns[None, :]
        u = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            h = u * tl.sigmoid(u) * tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
        else:
            u = tl.maximum(u, 0.0)
            h = u * u
        if SCALED:
            token = tl.load(token_ptr + rows, mask=rows < used, other=-1)
            h *= 1.0 + tl.load(
                delta_ptr + token.to(tl.int64)[:, None] * F + columns[None, :],
                mask=mask & (token >= 0)[:, None],
                other=0.0,
            ).to(tl.float32)
        tl.store(h_ptr + wide * F + columns[None, :], h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0915
    inner_ptr, dh_ptr, delta_ptr, token_ptr, gate_ptr, end_ptr, unit_ptr,
    h_ptr, dinner_ptr, ddelta_ptr, dp_ptr, h_sq_ptr, dinner_sq_ptr,
    E: tl.constexpr, F: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr,
    NORMS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    used = tl.load(end_ptr + E - 1)
    inner_width = 2 * F if GATED else F
    unit = 1.0
    if NORMS:
        unit = 1.0 / tl.load(unit_ptr)
    for first in range(tl.program_id(0) * BLOCK_R, used, tl.num_programs(0) * BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        row_mask = rows < used
        wide = rows.to(tl.int64)[:, None]
        gate = tl.load(gate_ptr + rows, mask=row_mask, other=0.0)[:, None]
        if SCALED:
            token = tl.load(token_ptr + rows, mask=row_mask, other=-1)
        dp = tl.zeros([BLOCK_R], dtype=tl.float32)
        h_sq = tl.zeros([BLOCK_R], dtype=tl.float32)
        dinner_sq = tl.zeros([BLOCK_R], dtype=tl.float32)
        for f in range(0, F, BLOCK_F):
            columns = f + tl.arange(0, BLOCK_F)
            mask = row_mask[:, None] & (columns < F)[None, :]
            at = wide * inner_width + columns[None, :]
            out = wide * F + columns[None, :]
            u = tl.load(inner_ptr + at, mask=mask, other=0.0).to(tl.float32)
            dh = tl.load(dh_ptr + out, mask=mask, other=0.0).to(tl.float32)
            da = dh
            if SCALED:
                scale = 1.0 + tl.load(
                    delta_ptr + token.to(tl.int64)[:, None] * F + columns[None, :],
                    mask=mask & (token >= 0)[:, None],
                    other=0.0,
                ).to(tl.float32)
                da = dh * scale
            if GATED:
                up = tl.load(inner_ptr + at + F, mask=mask, other=0.0).to(tl.float32)
                sigma = tl.sigmoid(u)
                silu = u * sigma
                a = silu * up
                du = da * up * (sigma + silu * (1.0 - sigma))
                dup = da * silu
                if NORMS:
                    dinner_sq += tl.sum((du * unit) * (du * unit), axis=1)
                    dinner_sq += tl.sum((dup * unit) * (dup * unit), axis=1)
                kind = dinner_ptr.dtype.element_ty
                tl.store(dinner_ptr + at, (du * gate).to(kind), mask=mask)
                tl.store(dinner_ptr + at + F, (dup * gate).to(kind), mask=mask)
            else:
                u = tl.maximum(u, 0.0)
                a = u * u
                du = 2.0 * u * da
                if NORMS:
                    dinner_sq += tl.sum((du * unit) * (du * unit), axis=1)
                tl.store(dinner_ptr + at, (du * gate).to(dinner_ptr.dtype.element_ty), mask=mask)
            h = a
            if SCALED:
                h = a * scale
                ddelta = a * dh * gate
                tl.store(ddelta_ptr + out, ddelta.to(ddelta_ptr.dtype.element_ty), mask=mask)
            dp += tl.sum(dh * h, axis=1)
            if NORMS:
                h_sq += tl.sum(h * h, axis=1)
            tl.store(h_ptr + out, (h * gate).to(h_ptr.dtype.element_ty), mask=mask)
        tl.store(dp_ptr + rows, dp, mask=row_mask)
        if NORMS:
            tl.store(h_sq_ptr + rows, h_sq, mask=row_mask)
            tl.store(dinner_sq_ptr + rows, dinner_sq, mask=row_mask)


def _programs(device: torch.device, rows: int, block: int) -> int:
    """Enough programs to fill the device, walking over what rows are used."""
    units = 2
    if device.type == "cuda":
        units = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return max(1, min(-(-rows // block), units * 16))


def activation_triton(
    kind: Activation, inner_PI: Tensor, delta_TF: Tensor | None, token_P: Tensor, ends_E: Tensor
) -> Tensor:
    """Hidden rows a(inner) * (1 + delta) [P, F]; padding rows of zero stay zero."""
    P, F = inner_PI.shape[0], inner_PI.shape[1] // (2 if kind == "swiglu" else 1)
    h_PF = torch.empty(P, F, dtype=inner_PI.dtype, device=inner_PI.device)
    block_f = min(512, max(16, triton.next_power_of_2(F)))
    block_r = max(1, 2048 // block_f)
    _forward_kernel[(_programs(inner_PI.device, P, block_r), triton.cdiv(F, block_f))](
        inner_PI, delta_TF, token_P, ends_E, h_PF,
        E=ends_E.shape[0], F=F, GATED=kind == "swiglu", SCALED=delta_TF is not None,
        BLOCK_R=block_r, BLOCK_F=block_f, num_warps=4,
    )  # fmt: skip
    return h_PF


class HiddenRows(NamedTuple):
    """What one pass over the hidden rows gives; see `activation_backward_triton`.

    Attributes:
        h_PF: gate * hidden activations.
        dinner_PI: gate * gradient on the inner rows.
        ddelta_PF: gate * gradient on the delta; None without one.
        dp_P: g . expert output, fp32.
        h_sq_P: |hidden activations|^2, fp32; None without norms.
        dinner_sq_P: |gradient on the inner row / unit|^2, fp32; None without norms.
    """

    h_PF: Tensor
    dinner_PI: Tensor
    ddelta_PF: Tensor | None
    dp_P: Tensor
    h_sq_P: Tensor | None
    dinner_sq_P: Tensor | None


def activation_backward_triton(
    kind: Activation,
    inner_PI: Tensor,
    dh_PF: Tensor,
    delta_TF: Tensor | None,
    token_P: Tensor,
    gate_P: Tensor,
    ends_E: Tensor,
    unit: Tensor | None,
) -> HiddenRows:
    """Go back through the hidden activations of all rows.

    Args:
        kind: activation.
        inner_PI: inner rows.
        dh_PF: gradient on the hidden rows at gate 1.
        delta_TF: the hidden channels of every token are multiplied by 1 + delta; or None.
        token_P: token of every row.
        gate_P: gate of every row, fp32.
        ends_E: ends of the groups.
        unit: 0-dim fp32, what a gradient is measured in (the loss scale); None leaves norms out.
    """
    P, F = dh_PF.shape

    def rows(wanted: bool = True) -> Tensor | None:
        made = torch.empty(P, dtype=torch.float32, device=dh_PF.device) if wanted else None
        return made

    norms = unit is not None
    out = HiddenRows(
        torch.empty_like(dh_PF),
        torch.empty_like(inner_PI),
        torch.empty_like(dh_PF) if delta_TF is not None else None,
        torch.empty(P, dtype=torch.float32, device=dh_PF.device),
        rows(norms),
        rows(norms),
    )
    block_f = min(512, max(16, triton.next_power_of_2(F)))
    block_r = max(1, 2048 // block_f)
    _backward_kernel[(_programs(inner_PI.device, P, block_r),)](
        inner_PI, dh_PF, delta_TF, token_P, gate_P, ends_E, unit, *out,
        E=ends_E.shape[0], F=F, GATED=kind == "swiglu", SCALED=delta_TF is not None, NORMS=norms,
        BLOCK_R=block_r, BLOCK_F=block_f, num_warps=4,
    )  # fmt: skip
    return out
