"""Tile sizes of the NSA kernels: a fixed table, so that two runs always do the same arithmetic."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache

import triton

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in {"", "0"}


@dataclass(frozen=True)
class TileConfig:
    """BM rows of queries by BN keys, warps per program, software pipeline stages.

    With `gluon` the kernel is the one in Gluon where that takes the call: `warps` is then fixed by
    the kernel, and Triton's kernel takes the other calls with the same tile.
    """

    BM: int
    BN: int
    warps: int
    stages: int
    gluon: bool = False


@dataclass(frozen=True)
class KernelConfigs:
    """The tiles of every kernel.

    For the selected kernels BM counts rows (queries times heads of the group) and BN is
    not used: the keys are one selected block. Their Gluon kernels gather by threads with two
    stages, by the copy engine with more. `piece_*` are the queries that one program serves.
    `combine_rows` are the rows of one program that merges partials.
    """

    forward: TileConfig
    window_forward: TileConfig
    grad_q: TileConfig
    grad_kv: TileConfig
    window_grad_kv: TileConfig
    score: TileConfig
    selected_forward: TileConfig
    selected_backward: TileConfig
    piece_forward: int
    piece_backward: int
    combine_rows: int
    delta_rows: int
    top_k_rows: int
    score_chunk: int
    partial_rows: int


_HOPPER = KernelConfigs(
    forward=TileConfig(128, 128, 8, 2, gluon=True),
    window_forward=TileConfig(128, 128, 8, 2, gluon=True),
    grad_q=TileConfig(64, 64, 4, 2, gluon=True),
    grad_kv=TileConfig(64, 128, 8, 3, gluon=True),
    window_grad_kv=TileConfig(64, 128, 8, 2, gluon=True),
    score=TileConfig(64, 128, 4, 2),
    selected_forward=TileConfig(64, 64, 4, 2, gluon=True),
    selected_backward=TileConfig(64, 64, 4, 3, gluon=True),
    piece_forward=64,
    piece_backward=512,
    combine_rows=16,
    delta_rows=16,
    top_k_rows=1,
    score_chunk=4096,
    partial_rows=8192 * 64 * 16,
)

# Head dims above 128: rows of queries and keys are two tiles, and dk and dv fill the registers.
_HOPPER_WIDE = replace(
    _HOPPER,
    forward=TileConfig(128, 64, 8, 2),
    window_forward=TileConfig(128, 64, 8, 2),
    grad_q=TileConfig(64, 64, 4, 2),
    grad_kv=TileConfig(32, 64, 4, 2),
    window_grad_kv=TileConfig(32, 64, 4, 2),
    score=TileConfig(64, 64, 4, 2),
    selected_forward=TileConfig(64, 64, 4, 2),
    selected_backward=TileConfig(32, 64, 4, 2),
)

_INTERPRETER = KernelConfigs(
    forward=TileConfig(32, 16, 1, 1),
    window_forward=TileConfig(16, 32, 1, 1),
    grad_q=TileConfig(32, 16, 1, 1),
    grad_kv=TileConfig(32, 32, 1, 1),
    window_grad_kv=TileConfig(32, 16, 1, 1),
    score=TileConfig(32, 16, 1, 1),
    selected_forward=TileConfig(32, 64, 1, 1),
    selected_backward=TileConfig(32, 64, 1, 1),
    piece_forward=16,
    piece_backward=24,
    combine_rows=32,
    delta_rows=32,
    top_k_rows=32,
    score_chunk=96,
    partial_rows=64 * 4 * 4,
)


@cache
def pow2(n: int) -> int:
    """Smallest power of two that is at least n and at least 16, the narrowest side of a tl.dot."""
    return max(16, int(triton.next_power_of_2(n)))


def kernel_configs(dim: int = 128) -> KernelConfigs:
    """Return the tiles for head dimension `dim`: those of Hopper, or the interpreter's."""
    if INTERPRETED:
        return _INTERPRETER
    return _HOPPER if dim <= 128 else _HOPPER_WIDE
