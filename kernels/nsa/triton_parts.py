"""Rows of queries and keys as one tile or two, so that no tile is wider than 128.

Rows of up to 128 elements are one tile, padded to a power of two. Wider ones (head dim 192) are a
tile of 128 and one of the rest: padded to 256 they would cost a third more, and products of tiles
256 wide were seen reading beyond their shared memory on Hopper (Triton 3.6). A row is a tuple of
its tiles; BD is the width of the first, BX of the second, 0 where there is none.
"""

# Arguments of @triton.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from kernels.nsa.triton_config import pow2

WIDEST = 128


def part_widths(width: int) -> dict[str, int]:
    """Return BD and BX of rows of `width` elements."""
    return {
        "BD": pow2(min(width, WIDEST)),
        "BX": pow2(width - WIDEST) if width > WIDEST else 0,
    }


def tile_width(width: int) -> int:
    """Width of tiles that a grid deals rows of `width` elements out in."""
    return pow2(width) if width <= WIDEST else pow2(width - WIDEST)


@triton.jit
def load_tile(
    source,
    row0,
    column,
    stride,
    end,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load ROWS rows from row0, WIDTH wide; rows from `end` on are zero or, by TMA, another's."""
    if TMA:
        return source.load([row0, column])
    else:
        row = row0 + tl.arange(0, ROWS)
        d = tl.arange(0, BLOCK)
        at = source + column + row.to(tl.int64)[:, None] * stride + d[None, :]
        if MASKED:
            return tl.load(at, mask=(row < end)[:, None] & (d < WIDTH)[None, :], other=0.0)
        elif BLOCK == WIDTH:
            return tl.load(at)
        else:
            return tl.load(at, mask=(d < WIDTH)[None, :], other=0.0)


@triton.jit
def load_parts(
    source,
    row0,
    column,
    stride,
    end,
    D: tl.constexpr,
    BD: tl.constexpr,
    BX: tl.constexpr,
    ROWS: tl.constexpr,
    TMA: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`load_tile` of rows in parts; the copy engine takes rows of one part only."""
    if BX == 0:
        return (load_tile(source, row0, column, stride, end, D, BD, ROWS, TMA, MASKED),)
    else:
        first = load_tile(source, row0, column, stride, end, BD, BD, ROWS, False, MASKED)
        rest = load_tile(source, row0, column + BD, stride, end, D - BD, BX, ROWS, False, MASKED)
        return first, rest


@triton.jit
def load_rows(ptr, at, ok, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load one row for every offset in `at`; rows that are not ok are zero."""
    d = tl.arange(0, BLOCK)
    if BLOCK == WIDTH:
        return tl.load(ptr + at[:, None] + d[None, :], mask=ok[:, None], other=0.0)
    else:
        mask = ok[:, None] & (d < WIDTH)[None, :]
        return tl.load(ptr + at[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def gather_parts(ptr, at, ok, D: tl.constexpr, BD: tl.constexpr, BX: tl.constexpr):
    """`load_rows` in parts."""
    if BX == 0:
        return (load_rows(ptr, at, ok, D, BD),)
    else:
        return load_rows(ptr, at, ok, BD, BD), load_rows(ptr + BD, at, ok, D - BD, BX)


@triton.jit
def _store_rows(ptr, at, x, ok, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    mask = ok[:, None] & (d < WIDTH)[None, :]
    tl.store(ptr + at[:, None] + d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_parts(ptr, at, x, ok, D: tl.constexpr, BD: tl.constexpr, BX: tl.constexpr):
    """Store the rows x, in parts, where `gather_parts` would load them."""
    if BX == 0:
        _store_rows(ptr, at, x[0], ok, D, BD)
    else:
        _store_rows(ptr, at, x[0], ok, BD, BD)
        _store_rows(ptr + BD, at, x[1], ok, D - BD, BX)


@triton.jit
def zero_parts(ROWS: tl.constexpr, BD: tl.constexpr, BX: tl.constexpr):
    """Return rows of zeros, fp32."""
    if BX == 0:
        return (tl.zeros((ROWS, BD), tl.float32),)
    else:
        return tl.zeros((ROWS, BD), tl.float32), tl.zeros((ROWS, BX), tl.float32)


@triton.jit
def scale_parts(x, by):
    """Multiply every element by a number."""
    if len(x) == 1:
        return (x[0] * by,)
    else:
        return x[0] * by, x[1] * by


@triton.jit
def add_parts(x, y):
    """Add two sets of rows."""
    if len(x) == 1:
        return (x[0] + y[0].to(tl.float32),)
    else:
        return x[0] + y[0].to(tl.float32), x[1] + y[1].to(tl.float32)


@triton.jit
def row_products(a, b):
    """Return a b^T, summed over the parts: [rows of a, rows of b] in fp32."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) == 2:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision="ieee")
    return s


@triton.jit
def add_product(p, b, acc):
    """Return acc + p b, part by part."""
    first = tl.dot(p, b[0], acc[0], input_precision="ieee")
    if len(b) == 1:
        return (first,)
    else:
        return first, tl.dot(p, b[1], acc[1], input_precision="ieee")
