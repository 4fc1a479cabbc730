"""Choosing the selected blocks: importance from the compressed branch, top-k, lists per block.

The scores are recomputed from the saved log-sum-exp tile by tile, summed over the heads of the
group in registers, folded to selected blocks (eq. 9) and ranked one chunk of queries at a time:
no T x T / 64 buffer exists.
"""

# Arguments of @triton.jit functions have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.nsa.spec import NsaSpec
from kernels.nsa.triton_config import KernelConfigs, pow2
from kernels.nsa.triton_interval import LOG2_E, column_of, tile_sources
from kernels.nsa.triton_layout import PackedLayout
from kernels.nsa.triton_parts import gather_parts, load_parts, part_widths, row_products


@triton.jit
def importance_kernel(
    q_src,
    k_ptr,
    lse_ptr,
    own_ptr,
    next_ptr,
    low_ptr,
    high_ptr,
    scale_log2,
    T,
    chunk,
    chunk_end,
    NB,
    NC,
    stride_qt,
    stride_qh,
    stride_kn,
    stride_kg,
    G: tl.constexpr,
    HG: tl.constexpr,
    RATIO: tl.constexpr,
    OVERLAP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BX: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    TMA: tl.constexpr,
):
    """Fold a tile of probabilities, summed over the group's heads, to selected blocks.

    own[t, g, j] is what block j earns from its own slots, next[t, g, j] what its last slot adds to
    block j + 1, because compressed blocks of two strides straddle selected blocks.
    """
    group = tl.program_id(2)
    first = chunk + tl.program_id(1) * BM
    last = tl.minimum(first + BM, chunk_end) - 1
    n0 = tl.program_id(0) * BN
    start = tl.load(low_ptr + first)
    stop = tl.load(high_ptr + last)
    if (n0 < stop) & (n0 + BN > start):
        rows = first + tl.arange(0, BM)
        inside = rows < chunk_end
        n = n0 + tl.arange(0, BN)
        k_at = n.to(tl.int64) * stride_kn
        k = gather_parts(k_ptr + group.to(tl.int64) * stride_kg, k_at, n < NC, D, BD, BX)
        head = group.to(tl.int64) * HG
        acc = tl.zeros((BM, BN), tl.float32)
        for h in range(HG):
            q_column = column_of(group * HG + h, stride_qh, D, TMA)
            q = load_parts(q_src, first, q_column, stride_qt, chunk_end, D, BD, BX, BM, TMA, True)
            lse = tl.load(lse_ptr + (head + h) * T + rows, mask=inside, other=0.0)
            s = row_products(q, k)
            acc += tl.exp2(s * scale_log2 - lse[:, None])
        low = tl.load(low_ptr + rows, mask=inside, other=0)
        high = tl.load(high_ptr + rows, mask=inside, other=0)
        visible = (n[None, :] >= low[:, None]) & (n[None, :] < high[:, None])
        acc = tl.where(visible, acc, 0.0)
        by_block = tl.reshape(acc, (BM, BN // RATIO, RATIO))
        whole = tl.sum(by_block, 2)
        j = n0 // RATIO + tl.arange(0, BN // RATIO)
        out = ((rows - chunk).to(tl.int64)[:, None] * G + group) * NB + j[None, :]
        mask = inside[:, None] & (j < NB)[None, :]
        if OVERLAP:
            r = tl.arange(0, RATIO)[None, None, :]
            final = tl.sum(tl.where(r == RATIO - 1, by_block, 0.0), 2)
            tl.store(own_ptr + out, 2.0 * whole - final, mask=mask)
            tl.store(next_ptr + out, final, mask=mask)
        else:
            tl.store(own_ptr + out, whole, mask=mask)


@triton.jit
def top_k_kernel(
    own_ptr,
    next_ptr,
    selected_ptr,
    key_ptr,
    token_ptr,
    T,
    chunk,
    chunk_end,
    NB,
    list_tokens,
    n_lists,
    G: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    SELECT: tl.constexpr,
    RATIO: tl.constexpr,
    OVERLAP: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
    BJ: tl.constexpr,
    ROWS: tl.constexpr,
):
    """selected[t, g, :] = pack-wide indices of the K best blocks, best first, then -1.

    Ranks the bits of the non-negative scores as integers; ties go to the lowest index. key is the
    list (chunk of list_tokens tokens, group, block) that the entry belongs to, n_lists for none.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < (chunk_end - chunk) * G
    t = chunk + row // G
    position = t - tl.load(token_ptr + t, mask=inside, other=0)
    base = tl.load(token_ptr + T + t, mask=inside, other=0)
    high = tl.load(token_ptr + 3 * T + t, mask=inside, other=0)
    current = position // SELECT
    j = tl.arange(0, BJ)
    block = base[:, None] + j[None, :]
    allowed = inside[:, None] & (j[None, :] <= current[:, None])
    at = row.to(tl.int64)[:, None] * NB + block
    score = tl.load(own_ptr + at, mask=allowed & (block * RATIO < high[:, None]), other=0.0)
    if OVERLAP:
        earlier = (j[None, :] > 0) & ((block - 1) * RATIO < high[:, None])
        score += tl.load(next_ptr + at - 1, mask=allowed & earlier, other=0.0)
    forced = (j[None, :] < INITIAL) | (j[None, :] > current[:, None] - LOCAL)
    rank = tl.where(forced, 0x7FFFFFFF, score.to(tl.int32, bitcast=True))
    rank = tl.where(allowed, rank, -1)
    slot = tl.arange(0, BK)
    chosen = tl.full((ROWS, BK), -1, tl.int32)
    for i in range(K):
        best = tl.max(rank, 1)
        winner = tl.min(tl.where(rank == best[:, None], j[None, :], BJ), 1)
        rank = tl.where(j[None, :] == winner[:, None], -1, rank)
        found = tl.where(best >= 0, base + winner, -1)
        chosen = tl.where(slot[None, :] == i, found[:, None], chosen)
    out = (t.to(tl.int64) * G + row % G)[:, None] * K + slot[None, :]
    mask = inside[:, None] & (slot < K)[None, :]
    tl.store(selected_ptr + out, chosen, mask=mask)
    owner = (t // list_tokens * G + row % G)[:, None] * NB + chosen
    tl.store(key_ptr + out, tl.where(chosen >= 0, owner, n_lists), mask=mask)


def select_blocks(
    q_THD: Tensor,
    k_NGD: Tensor,
    lse_HT: Tensor,
    layout: PackedLayout,
    spec: NsaSpec,
    scale: float,
    list_tokens: int,
    configs: KernelConfigs,
) -> tuple[Tensor, Tensor]:
    """Return int32 [T, G, K]: pack-wide indices of each query's selected blocks, -1 where none.

    The second tensor of the same shape holds the list of each entry, see `block_lists`.

    Args:
        q_THD: queries.
        k_NGD: compressed keys [NC, G, D].
        lse_HT: base-2 log-sum-exp of the compressed branch.
        layout: of the documents.
        spec: the sizes.
        scale: of the scores.
        list_tokens: tokens per chunk of the lists.
        configs: the tiles.
    """
    T, H, D = q_THD.shape
    G = k_NGD.shape[1]
    tile = configs.score
    n_lists = -(-T // list_tokens) * G * layout.n_blocks
    ratio = spec.select // spec.stride
    overlap = spec.block > spec.stride
    selected = torch.empty(T, G, spec.selected, dtype=torch.int32, device=q_THD.device)
    keys = torch.empty_like(selected)
    rows = min(T, configs.score_chunk)
    shape = (2 if overlap else 1, rows, G, layout.n_blocks)
    scratch = torch.empty(shape, dtype=torch.float32, device=q_THD.device)
    (q,), tma = tile_sources(tile.BM, q_THD)
    for chunk in range(0, T, rows):
        end = min(T, chunk + rows)
        # Blocks are dealt from the start of the pack, so later ones cannot belong to this chunk.
        reach = min(layout.n_slots, ratio * (triton.cdiv(end, spec.select) + layout.extra_blocks))
        importance_kernel[(triton.cdiv(reach, tile.BN), triton.cdiv(end - chunk, tile.BM), G)](
            q,
            k_NGD,
            lse_HT,
            scratch[0],
            scratch[-1],
            layout.tokens[2],
            layout.tokens[3],
            scale * LOG2_E,
            T,
            chunk,
            end,
            layout.n_blocks,
            layout.n_slots,
            q_THD.stride(0),
            q_THD.stride(1),
            k_NGD.stride(0),
            k_NGD.stride(1),
            G=G,
            HG=H // G,
            RATIO=ratio,
            OVERLAP=overlap,
            D=D,
            **part_widths(D),
            BM=tile.BM,
            BN=tile.BN,
            TMA=tma,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        width = min(layout.longest_blocks, triton.cdiv(end, spec.select))
        top_k_kernel[(triton.cdiv((end - chunk) * G, configs.top_k_rows),)](
            scratch[0],
            scratch[-1],
            selected,
            keys,
            layout.tokens,
            T,
            chunk,
            end,
            layout.n_blocks,
            list_tokens,
            n_lists,
            G=G,
            K=spec.selected,
            BK=pow2(spec.selected),
            SELECT=spec.select,
            RATIO=ratio,
            OVERLAP=overlap,
            INITIAL=spec.initial,
            LOCAL=spec.local,
            BJ=pow2(width),
            ROWS=configs.top_k_rows,
            num_warps=1,
        )
    return selected, keys


@dataclass(frozen=True)
class BlockLists:
    """For every list (chunk of tokens, group, block) the queries that selected the block.

    Attributes:
        order: int32 [T * G * K], entries (t * G + g) * K + slot, by list, each in token order.
        bounds: int32 [lists + 1], where each list starts in `order`.
        chunk_tokens: tokens per chunk. n_chunks: how many.
    """

    order: Tensor
    bounds: Tensor
    chunk_tokens: int
    n_chunks: int


def block_lists(keys_TGK: Tensor, n_blocks: int, list_tokens: int) -> BlockLists:
    """Sort the entries by list: a stable CSR, so that sums over queries have a fixed order."""
    T, G = keys_TGK.shape[:2]
    n_chunks = -(-T // list_tokens)
    lists = n_chunks * G * n_blocks
    ordered, order = torch.sort(keys_TGK.flatten(), stable=True)
    edges = torch.arange(lists + 1, device=keys_TGK.device, dtype=torch.int32)
    bounds = torch.searchsorted(ordered, edges, out_int32=True)
    return BlockLists(order.to(torch.int32), bounds, list_tokens, n_chunks)


@triton.jit
def first_piece(bounds_ptr, list0, local, SIZE: tl.constexpr):
    """Number, in its chunk, of the first piece of list `local` of the chunk that starts at list0.

    Rounding down leaves every list room for its pieces, and needs no sum over the lists before.
    """
    below = tl.load(bounds_ptr + list0 + local) // SIZE
    return below - tl.load(bounds_ptr + list0) // SIZE + local


# Sizes that change with every pack of documents must not each compile a kernel anew.
@triton.jit(do_not_specialize=("lists_per_chunk", "most_per_chunk", "NB"))
def pieces_kernel(
    bounds_ptr,
    table_ptr,
    lists_per_chunk,
    most_per_chunk,
    NB,
    SIZE: tl.constexpr,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Row (chunk, number) of the table: begin, end, block and 2 * group + (the list's only piece).

    Numbers without a piece have an end that is not above their begin.
    """
    chunk = tl.program_id(1)
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    list0 = chunk * lists_per_chunk
    low = tl.zeros((ROWS,), tl.int32)
    high = tl.zeros((ROWS,), tl.int32) + lists_per_chunk
    for _ in range(STEPS):
        middle = (low + high) // 2
        left = first_piece(bounds_ptr, list0, middle, SIZE) <= number
        low = tl.where(left, middle, low)
        high = tl.where(left, high, middle)
    start = tl.load(bounds_ptr + list0 + low)
    stop = tl.load(bounds_ptr + list0 + low + 1)
    begin = start + (number - first_piece(bounds_ptr, list0, low, SIZE)) * SIZE
    at = table_ptr + (chunk * most_per_chunk + number) * 4
    inside = number < most_per_chunk
    tl.store(at, begin, mask=inside)
    tl.store(at + 1, tl.minimum(begin + SIZE, stop), mask=inside)
    tl.store(at + 2, low % NB, mask=inside)
    tl.store(at + 3, low // NB * 2 + (stop - start <= SIZE).to(tl.int32), mask=inside)


@dataclass(frozen=True)
class Pieces:
    """Lists cut into pieces of at most `size` queries, one program each, so that hot blocks split.

    Attributes:
        table: int32 [chunks * most_per_chunk, 4], see `pieces_kernel`.
        most_per_chunk: host bound on the pieces of a chunk: surplus programs leave at once.
        size: of a piece.
    """

    table: Tensor
    most_per_chunk: int
    size: int


def cut_pieces(lists: BlockLists, groups: int, n_blocks: int, slots: int, size: int) -> Pieces:
    """Cut every list into pieces of at most `size` queries without reading anything back."""
    entries = min(lists.order.numel(), lists.chunk_tokens * groups * slots)
    most_per_chunk = entries // size + 1 + groups * n_blocks
    table = torch.empty(
        lists.n_chunks * most_per_chunk, 4, dtype=torch.int32, device=lists.order.device
    )
    rows = 128
    pieces_kernel[(triton.cdiv(most_per_chunk, rows), lists.n_chunks)](
        lists.bounds,
        table,
        groups * n_blocks,
        most_per_chunk,
        n_blocks,
        SIZE=size,
        STEPS=(groups * n_blocks).bit_length(),
        ROWS=rows,
        num_warps=4,
    )
    return Pieces(table, most_per_chunk, size)
