"""Pre-pass of the backward: do . o of every branch, which is also the gradient of its gate."""

# Arguments of @triton.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.nsa.triton_config import KernelConfigs, pow2


@triton.jit
def delta_kernel(
    do_ptr,
    compressed_ptr,
    selected_ptr,
    window_ptr,
    gates_ptr,
    interval_lse_ptr,
    selected_lse_ptr,
    interval_delta_ptr,
    interval_folded_ptr,
    selected_delta_ptr,
    selected_folded_ptr,
    dgates_ptr,
    T,
    H: tl.constexpr,
    DV: tl.constexpr,
    BDV: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows are (t, head). Interval branches want [H, T], the selected one [T, H].

    folded = lse - log2(gate), so that exp2(score - folded) is the probability times its gate; a
    gate of 0 folds to infinity and the product to 0.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < tl.cast(T, tl.int64) * H
    dv = tl.arange(0, BDV)
    at = row[:, None] * DV + dv[None, :]
    mask = inside[:, None] & (dv < DV)[None, :]
    do = tl.load(do_ptr + at, mask=mask, other=0.0).to(tl.float32)
    across = (row % H) * T + row // H
    plane = tl.cast(T, tl.int64) * H
    for branch in tl.static_range(3):
        if branch == 0:
            o = tl.load(compressed_ptr + at, mask=mask, other=0.0)
        elif branch == 1:
            o = tl.load(selected_ptr + at, mask=mask, other=0.0)
        else:
            o = tl.load(window_ptr + at, mask=mask, other=0.0)
        delta = tl.sum(do * o.to(tl.float32), 1)
        gate = tl.load(gates_ptr + row * 3 + branch, mask=inside, other=1.0)
        fold = tl.log2(gate.to(tl.float32))
        tl.store(dgates_ptr + row * 3 + branch, delta.to(dgates_ptr.dtype.element_ty), mask=inside)
        if branch == 1:
            tl.store(selected_delta_ptr + row, delta, mask=inside)
            lse = tl.load(selected_lse_ptr + row, mask=inside, other=0.0)
            tl.store(selected_folded_ptr + row, lse - fold, mask=inside)
        else:
            to = across + (branch // 2) * plane
            tl.store(interval_delta_ptr + to, delta, mask=inside)
            lse = tl.load(interval_lse_ptr + to, mask=inside, other=0.0)
            tl.store(interval_folded_ptr + to, lse - fold, mask=inside)


def branch_deltas(
    do_THD: Tensor,
    compressed_THD: Tensor,
    selected_THD: Tensor,
    window_THD: Tensor,
    gates_TH3: Tensor,
    lse_2HT: Tensor,
    lse_TH: Tensor,
    configs: KernelConfigs,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return delta and folded lse of (compressed, window) [2, H, T], selected [T, H]; and dgates.

    All fp32 but dgates, which has the gates' dtype. Inputs are contiguous.
    """
    T, H, DV = do_THD.shape
    interval = torch.empty(2, 2, H, T, dtype=torch.float32, device=do_THD.device)
    selected = torch.empty(2, T, H, dtype=torch.float32, device=do_THD.device)
    dgates = torch.empty_like(gates_TH3)
    delta_kernel[(triton.cdiv(T * H, configs.delta_rows),)](
        do_THD,
        compressed_THD,
        selected_THD,
        window_THD,
        gates_TH3,
        lse_2HT,
        lse_TH,
        interval[0],
        interval[1],
        selected[0],
        selected[1],
        dgates,
        T,
        H=H,
        DV=DV,
        BDV=pow2(DV),
        ROWS=configs.delta_rows,
        num_warps=4,
    )
    return interval[0], interval[1], selected[0], selected[1], dgates
