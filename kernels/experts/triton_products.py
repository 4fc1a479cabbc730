"""Grouped products of our own, with the gather in front and the activation behind inside them.

`rows` kernels: a program takes tiles of 128 rows x some columns of one expert after another
(persistent), rows of A straight from the token's row (pointers) or from pair rows (TMA), weights by
TMA. Three endings: store; activate and store inner and hidden rows; or go back through the
activation and store what the weight gradients need, with the row sums of Surprise per column tile.
`weights` kernels: a program takes tiles of one expert's weight gradient and walks over its rows.

Groups start at multiples of ALIGN rows, so that a tile belongs to one expert; padding rows are
zeros (a gather of token -1) and stay zeros through every step.

Shapes: T tokens, P rows, E experts, C width, F hidden, I inner (swiglu 2F, relu2 F).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.experts.activation import Activation
from kernels.experts.spec import Tiles
from kernels.experts.triton_activation import HiddenRows
from kernels.experts.triton_route import Routing

ALIGN = 128
"""Rows of a tile, and what groups are padded to."""

PLAIN, FORWARD, BACKWARD = 0, 1, 2


@triton.jit  # type: ignore[untyped-decorator]
def _end_forward(  # type: ignore[no-untyped-def]
    first, second, token, rows, columns, mask, inner_ptr, h_ptr, delta_ptr,
    F: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Store inner rows and their hidden activations."""
    kind = inner_ptr.dtype.element_ty
    width = 2 * F if GATED else F
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    first = first.to(kind)
    tl.store(inner_ptr + at, first, mask=mask)
    u = first.to(tl.float32)
    if GATED:
        second = second.to(kind)
        tl.store(inner_ptr + at + F, second, mask=mask)
        h = u * tl.sigmoid(u) * second.to(tl.float32)
    else:
        u = tl.maximum(u, 0.0)
        h = u * u
    if SCALED:
        h *= 1.0 + tl.load(
            delta_ptr + token.to(tl.int64)[:, None] * F + columns[None, :],
            mask=mask & (token >= 0)[:, None],
            other=0.0,
        ).to(tl.float32)
    tl.store(h_ptr + rows.to(tl.int64)[:, None] * F + columns[None, :], h.to(kind), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _end_backward(  # type: ignore[no-untyped-def]
    dh, token, rows, columns, mask, inner_ptr, delta_ptr, gate_ptr, unit,
    h_ptr, dinner_ptr, ddelta_ptr, dp_ptr, h_sq_ptr, dinner_sq_ptr, part,
    F: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """Store gate * h, gate * dinner, and this tile's part of dp and of the squared norms."""
    kind = h_ptr.dtype.element_ty
    width = 2 * F if GATED else F
    at = rows.to(tl.int64)[:, None] * width + columns[None, :]
    out = rows.to(tl.int64)[:, None] * F + columns[None, :]
    gate = tl.load(gate_ptr + rows)[:, None]
    # What the separate kernel would have read.
    dh = dh.to(kind).to(tl.float32)
    da = dh
    if SCALED:
        scale = 1.0 + tl.load(
            delta_ptr + token.to(tl.int64)[:, None] * F + columns[None, :],
            mask=mask & (token >= 0)[:, None],
            other=0.0,
        ).to(tl.float32)
        da = dh * scale
    u = tl.load(inner_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(inner_ptr + at + F, mask=mask, other=0.0).to(tl.float32)
        sigma = tl.sigmoid(u)
        silu = u * sigma
        a = silu * up
        du = da * up * (sigma + silu * (1.0 - sigma))
        dup = da * silu
        tl.store(dinner_ptr + at + F, (dup * gate).to(kind), mask=mask)
        if NORMS:
            dinner_sq = tl.sum((du * unit) * (du * unit) + (dup * unit) * (dup * unit), axis=1)
            tl.store(dinner_sq_ptr + part + rows, dinner_sq)
    else:
        u = tl.maximum(u, 0.0)
        a = u * u
        du = 2.0 * u * da
        if NORMS:
            tl.store(dinner_sq_ptr + part + rows, tl.sum((du * unit) * (du * unit), axis=1))
    tl.store(dinner_ptr + at, (du * gate).to(kind), mask=mask)
    h = a
    if SCALED:
        h = a * scale
        tl.store(ddelta_ptr + out, (a * dh * gate).to(kind), mask=mask)
    tl.store(dp_ptr + part + rows, tl.sum(tl.where(mask, dh * h, 0.0), axis=1))
    if NORMS:
        tl.store(h_sq_ptr + part + rows, tl.sum(h * h, axis=1))
    tl.store(h_ptr + out, (h * gate).to(kind), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _rows_kernel(  # type: ignore[no-untyped-def]
    a_ptr, a_desc, b_desc, token_ptr, end_ptr, out_ptr,
    inner_ptr, delta_ptr, gate_ptr, unit_ptr, h_ptr, dinner_ptr, ddelta_ptr,
    dp_ptr, h_sq_ptr, dinner_sq_ptr, P,
    K: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
    GATHER: tl.constexpr, ROW_MAJOR: tl.constexpr, ENDING: tl.constexpr, GATED: tl.constexpr,
    SCALED: tl.constexpr, NORMS: tl.constexpr, FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    DUAL: tl.constexpr = GATED and ENDING == 1
    experts = tl.arange(0, BLOCK_E)
    ends = tl.load(end_ptr + experts, mask=experts < E, other=2147483647)
    used = tl.load(end_ptr + E - 1)
    column_tiles = tl.cdiv(N, BLOCK_N)
    unit = 1.0
    if ENDING == 2 and NORMS:
        unit = 1.0 / tl.load(unit_ptr)
    for tile in tl.range(
        tl.program_id(0), used // BLOCK_M * column_tiles, tl.num_programs(0), flatten=FLATTEN
    ):
        first_row = tile // column_tiles * BLOCK_M
        first_column = tile % column_tiles * BLOCK_N
        expert = tl.sum((ends <= first_row).to(tl.int32), axis=0)
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = first_column + tl.arange(0, BLOCK_N)
        token = tl.load(token_ptr + rows)
        channels = tl.arange(0, BLOCK_K)
        a_at = a_ptr + token.to(tl.int64)[:, None] * K + channels[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        other = total
        for k in range(0, K, BLOCK_K):
            if GATHER:
                seen = (token >= 0)[:, None] & (k + channels < K)[None, :]
                a = tl.load(a_at + k, mask=seen, other=0.0)
            else:
                a = a_desc.load([first_row, k])
            if ROW_MAJOR:
                row = expert * (2 * N if DUAL else N) + first_column
                b = b_desc.load([row, k]).T
            else:
                b = b_desc.load([expert * K + k, first_column])
            total = tl.dot(a, b, total, input_precision="ieee")
            if DUAL:
                c = b_desc.load([expert * 2 * N + N + first_column, k]).T
                other = tl.dot(a, c, other, input_precision="ieee")
        mask = (columns < N)[None, :] & (rows >= 0)[:, None]
        if ENDING == 0:
            at = out_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :]
            tl.store(at, total.to(out_ptr.dtype.element_ty), mask=mask)
        elif ENDING == 1:
            _end_forward(
                total, other, token, rows, columns, mask, inner_ptr, h_ptr, delta_ptr,
                N, GATED, SCALED,
            )  # fmt: skip
        else:
            part = (tile % column_tiles).to(tl.int64) * P
            _end_backward(
                total, token, rows, columns, mask, inner_ptr, delta_ptr, gate_ptr, unit,
                h_ptr, dinner_ptr, ddelta_ptr, dp_ptr, h_sq_ptr, dinner_sq_ptr, part,
                N, GATED, SCALED, NORMS,
            )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _weights_kernel(  # type: ignore[no-untyped-def]
    a_ptr, a_desc, b_ptr, b_desc, token_ptr, end_ptr, out_ptr,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
    GATHER_A: tl.constexpr, GATHER_B: tl.constexpr, FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    tiles = row_tiles * column_tiles
    for tile in tl.range(tl.program_id(0), E * tiles, tl.num_programs(0), flatten=FLATTEN):
        expert = tile // tiles
        first_m = tile % tiles // column_tiles * BLOCK_M
        first_n = tile % column_tiles * BLOCK_N
        end = tl.load(end_ptr + expert)
        start = tl.load(end_ptr + tl.maximum(expert - 1, 0))
        start = tl.where(expert > 0, start, 0)
        m = first_m + tl.arange(0, BLOCK_M)
        n = first_n + tl.arange(0, BLOCK_N)
        total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for first in range(start, end, BLOCK_K):
            if GATHER_A or GATHER_B:
                token = tl.load(token_ptr + first + tl.arange(0, BLOCK_K))
                seen = (token >= 0)[:, None]
            if GATHER_A:
                at = a_ptr + token.to(tl.int64)[:, None] * M + m[None, :]
                a = tl.load(at, mask=seen & (m < M)[None, :], other=0.0)
            else:
                a = a_desc.load([first, first_m])
            if GATHER_B:
                at = b_ptr + token.to(tl.int64)[:, None] * N + n[None, :]
                b = tl.load(at, mask=seen & (n < N)[None, :], other=0.0)
            else:
                b = b_desc.load([first, first_n])
            total = tl.dot(a.T, b, total, input_precision="ieee")
        at = (expert.to(tl.int64) * M + m)[:, None] * N + n[None, :]
        mask = (m < M)[:, None] & (n < N)[None, :]
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def _programs(device: torch.device, tiles: int, per_unit: int) -> int:
    units = 2
    if device.type == "cuda":
        units = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return max(1, min(tiles, units * per_unit))


def _flat(weights: Tensor, block: list[int]) -> TensorDescriptor:
    """Descriptor of stacked matrices as one tall one."""
    tall = weights.contiguous().view(-1, weights.shape[-1])
    return TensorDescriptor.from_tensor(tall, block)


def _launch_rows(
    a: Tensor,
    weights: Tensor,
    routing: Routing,
    tiles: Tiles,
    n: int,
    *,
    gather: bool,
    row_major: bool,
    ending: int = PLAIN,
    gated: bool = False,
    out: Tensor | None = None,
    inner: Tensor | None = None,
    delta: Tensor | None = None,
    unit: Tensor | None = None,
    hidden: HiddenRows | None = None,
    h: Tensor | None = None,
) -> None:
    P, K, E = routing.token_P.shape[0], a.shape[1], routing.ends_E.shape[0]
    wide = a.dtype == torch.float32
    block_k = min(tiles.k // 2 if wide else tiles.k, max(16, triton.next_power_of_2(K)))
    block_n = min(tiles.n // 2 if wide else tiles.n, max(16, triton.next_power_of_2(n)))
    rows = hidden if hidden is not None else HiddenRows(h, None, None, None, None, None)  # type: ignore[arg-type]
    programs = _programs(a.device, P // ALIGN * triton.cdiv(n, block_n), tiles.per_unit)
    block = [block_n, block_k] if row_major else [block_k, block_n]
    _rows_kernel[(programs,)](
        a, None if gather else TensorDescriptor.from_tensor(a, [ALIGN, block_k]),
        _flat(weights, block), routing.token_P, routing.ends_E, out,
        inner, delta, routing.gate_P, unit, rows.h_PF, rows.dinner_PI, rows.ddelta_PF,
        rows.dp_P, rows.h_sq_P, rows.dinner_sq_P, P,
        K=K, N=n, E=E, GATHER=gather, ROW_MAJOR=row_major, ENDING=ending, GATED=gated,
        SCALED=delta is not None, NORMS=unit is not None, FLATTEN=tiles.flatten,
        BLOCK_M=ALIGN, BLOCK_N=block_n, BLOCK_K=block_k,
        BLOCK_E=max(16, triton.next_power_of_2(E)),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def up_product(
    kind: Activation,
    x_TC: Tensor,
    w_in_EIC: Tensor,
    delta_TF: Tensor | None,
    routing: Routing,
    tiles: Tiles,
) -> tuple[Tensor, Tensor]:
    """Inner rows [P, I] and hidden rows [P, F] from the tokens' own rows."""
    P, inner = routing.token_P.shape[0], w_in_EIC.shape[1]
    gated = kind == "swiglu"
    F = inner // 2 if gated else inner
    inner_PI = torch.empty(P, inner, dtype=x_TC.dtype, device=x_TC.device)
    h_PF = torch.empty(P, F, dtype=x_TC.dtype, device=x_TC.device)
    _launch_rows(
        x_TC, w_in_EIC, routing, tiles, F, gather=True, row_major=True, ending=FORWARD,
        gated=gated, inner=inner_PI, delta=delta_TF, h=h_PF,
    )  # fmt: skip
    return inner_PI, h_PF


def down_product(h_PF: Tensor, w_out_ECF: Tensor, routing: Routing, tiles: Tiles) -> Tensor:
    """Output rows [P, C] = h W_out^T."""
    C = w_out_ECF.shape[1]
    out = torch.empty(h_PF.shape[0], C, dtype=h_PF.dtype, device=h_PF.device)
    _launch_rows(h_PF, w_out_ECF, routing, tiles, C, gather=False, row_major=True, out=out)
    return out


def hidden_gradients(
    kind: Activation,
    g_TC: Tensor,
    w_out_ECF: Tensor,
    inner_PI: Tensor,
    delta_TF: Tensor | None,
    routing: Routing,
    unit: Tensor | None,
    tiles: Tiles,
) -> HiddenRows:
    """Back through W_out and the activation at once; see `activation_backward_triton`.

    The row sums come in parts, one for every tile of columns: [parts, P].
    """
    P, F = inner_PI.shape[0], w_out_ECF.shape[2]
    block_n = min(
        tiles.n // 2 if g_TC.dtype == torch.float32 else tiles.n,
        max(16, triton.next_power_of_2(F)),
    )
    parts = triton.cdiv(F, block_n)

    def wide() -> Tensor:
        return torch.empty(parts, P, dtype=torch.float32, device=g_TC.device)

    def like(width: int) -> Tensor:
        return torch.empty(P, width, dtype=g_TC.dtype, device=g_TC.device)

    hidden = HiddenRows(
        like(F), torch.empty_like(inner_PI), like(F) if delta_TF is not None else None, wide(),
        wide() if unit is not None else None, wide() if unit is not None else None,
    )  # fmt: skip
    _launch_rows(
        g_TC, w_out_ECF, routing, tiles, F, gather=True, row_major=False, ending=BACKWARD,
        gated=kind == "swiglu", inner=inner_PI, delta=delta_TF, unit=unit, hidden=hidden,
    )  # fmt: skip
    return hidden


def dx_product(dinner_PI: Tensor, w_in_EIC: Tensor, routing: Routing, tiles: Tiles) -> Tensor:
    """Gradient rows of x [P, C] = dinner W_in."""
    C = w_in_EIC.shape[2]
    out = torch.empty(dinner_PI.shape[0], C, dtype=dinner_PI.dtype, device=dinner_PI.device)
    _launch_rows(dinner_PI, w_in_EIC, routing, tiles, C, gather=False, row_major=False, out=out)
    return out


def weight_gradient(
    a: Tensor, b: Tensor, routing: Routing, tiles: Tiles, *, gather_a: bool, gather_b: bool
) -> Tensor:
    """Gradient [E, M, N] of stacked weights: sum over an expert's rows of a^T b.

    Args:
        a: pair rows [P, M], or tokens [T, M] when gathered.
        b: pair rows [P, N], or tokens [T, N] when gathered.
        routing: what ran.
        tiles: see `Tiles`.
        gather_a: a holds tokens.
        gather_b: b holds tokens.
    """
    M, N, E = a.shape[1], b.shape[1], routing.ends_E.shape[0]
    wide = a.dtype == torch.float32
    block_m = min(tiles.m // 2 if wide else tiles.m, max(16, triton.next_power_of_2(M)))
    block_n = min(tiles.n // 2 if wide else tiles.n, max(16, triton.next_power_of_2(N)))
    block_k = tiles.k // 2 if wide else tiles.k
    out = torch.empty(E, M, N, dtype=a.dtype, device=a.device)
    count = E * triton.cdiv(M, block_m) * triton.cdiv(N, block_n)
    _weights_kernel[(_programs(a.device, count, tiles.per_unit),)](
        a, None if gather_a else TensorDescriptor.from_tensor(a, [block_k, block_m]),
        b, None if gather_b else TensorDescriptor.from_tensor(b, [block_k, block_n]),
        routing.token_P, routing.ends_E, out,
        M=M, N=N, E=E, GATHER_A=gather_a, GATHER_B=gather_b, FLATTEN=tiles.flatten,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out
