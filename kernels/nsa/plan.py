"""Which rows and columns of the score matrices exist: packed documents laid out for one spec.

Queries stay packed; they are cut into tiles of neighbouring queries: parts of one document, or
several short documents together. Keys of the selected branch are laid out in slots: every document
starts at a new selection block, so block j holds slots [j·l', (j + 1)·l') and compressed block i of
a document stands at i plus l'/d times the document's first block. Eq. 9 is then the same strided
sum everywhere, and a choice of blocks becomes a mask of tokens by repetition. Slots past a
document's end repeat its last token; no query sees them.

Everything a tile looks at follows from document lengths on the host: nothing is read back.

Shapes: B queries of a tile, J selection blocks, N compressed slots, C columns (keys) of a tile.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.nsa.selection import rank_bias
from kernels.nsa.spec import NsaSpec
from kernels.transfer import to_device

MASK_CACHE_BYTES = 64 << 20
CPU_TILE = 128
GPU_SCORE_BYTES = 1 << 30


class Tile(NamedTuple):
    """Queries [begin, end) and what they may look at.

    Attributes:
        begin: first query, packed.
        end: one past the last query.
        window: first key of the window branch; the last is the last query.
        block_begin: first selection block, that of the first query's document.
        block_end: one past the last selection block, that of the last query.
        slot_end: one past the last query's slot.
        blind: no compressed block is visible to any of the queries.
        some_blind: none is visible to one of them.
        scored: some query sees more blocks than it may select, so that importance matters.
        shape: equal for tiles whose masks are equal, so that they can share them.
    """

    begin: int
    end: int
    window: int
    block_begin: int
    block_end: int
    slot_end: int
    blind: bool
    some_blind: bool
    scored: bool
    shape: tuple[int, int]


def cut(lengths: tuple[int, ...], tile: int) -> list[tuple[int, int]]:
    """Cut packed documents into query ranges of at most `tile`; short documents share one.

    A range that crosses documents computes scores between them for nothing, a small one wastes
    a call: documents of half a tile and more get ranges of their own.
    """
    out: list[tuple[int, int]] = []
    begin = end = 0
    for n in lengths:
        own = n >= tile // 2
        if end > begin and (own or end - begin + n > tile):
            out.append((begin, end))
            begin = end
        if own:
            parts = -(-n // tile)
            edges = [end + n * i // parts for i in range(parts + 1)]
            out.extend(pairwise(edges))
            begin = end + n
        end += n
    return [*out, (begin, end)] if end > begin else out


class Plan:
    """Layout of one set of documents for one spec; tensors live on the documents' device.

    Attributes:
        blocks: selection blocks of all documents together.
        tiles: the query tiles, in order.
        token_of_slot: token of every slot, int64 [blocks·l'].
        slot_of_token: slot of every token, int64 [T].
    """

    def __init__(self, docs: Documents, spec: NsaSpec, tile: int) -> None:
        """Lay out the documents in tiles of `tile` queries."""
        self.spec = spec
        self._docs = (docs.starts, docs.lengths)
        n_B = torch.tensor(docs.lengths)
        start_B = torch.tensor(docs.starts)
        J_B = (n_B + spec.select - 1) // spec.select
        first_B = J_B.cumsum(0) - J_B
        self._first_block = first_B.tolist()
        self.blocks = int(J_B.sum())
        self.slots_per_block = spec.select // spec.stride

        doc_of_token = torch.repeat_interleave(n_B)
        slots_B = J_B * spec.select
        doc_of_slot = torch.repeat_interleave(slots_B)
        local = torch.arange(self.blocks * spec.select) - (first_B * spec.select)[doc_of_slot]
        token_of_slot = start_B[doc_of_slot] + torch.minimum(local, n_B[doc_of_slot] - 1)
        tokens = torch.arange(docs.total)
        block_low = first_B[doc_of_token]
        slot_of_token = block_low * spec.select + tokens - start_B[doc_of_token]

        # Compressed slots are every stride-th slot; those without a whole block are never visible.
        starts = local[:: spec.stride]
        whole = starts + spec.block <= n_B[doc_of_slot[:: spec.stride]]
        compressed_first = start_B[doc_of_slot[:: spec.stride]] + starts
        compressed_last = torch.where(whole, compressed_first + spec.block - 1, docs.total)

        def put(x: Tensor) -> Tensor:
            return to_device(x, docs.device)

        self.token_of_slot = put(token_of_slot)
        self.slot_of_token = put(slot_of_token)
        self._tokens = put(tokens.int())
        self._doc_start = put(start_B[doc_of_token].int())
        self._block_low = put(block_low.int())
        self._block_of_token = put((slot_of_token // spec.select).int())
        self._compressed_first = put(compressed_first.int())
        self._compressed_last = put(compressed_last.int())
        self._block_numbers = put(torch.arange(self.blocks, dtype=torch.int32))
        self._slot_numbers = put(torch.arange(self.blocks * spec.select, dtype=torch.int32))
        self._zero = put(torch.zeros(()))
        self._minus_inf = put(torch.full((), float("-inf")))
        self._masks: dict[tuple[str, tuple[int, int]], Tensor] = {}
        self._mask_bytes = 0
        self._tiles_from: dict[int, list[Tile]] = {}
        self.tiles = [self._tile(begin, end) for begin, end in cut(docs.lengths, tile)]

    def _tile(self, begin: int, end: int) -> Tile:
        starts, lengths = self._docs
        first = bisect_right(starts, begin) - 1
        last = bisect_right(starts, end - 1) - 1
        # Tokens of each document up to the tile's last query: what the tile can see at most.
        seen = [min(lengths[b], end - starts[b]) for b in range(first, last + 1)]
        # Inside one document masks depend on positions only; they differ wherever documents meet.
        at = begin - starts[first] if first == last else -1 - begin
        return Tile(
            begin,
            end,
            window=max(starts[first], begin - self.spec.window + 1),
            block_begin=self._first_block[first],
            block_end=self._first_block[last] + self.spec.selection_blocks(seen[-1]),
            slot_end=self._first_block[last] * self.spec.select + seen[-1],
            blind=max(seen) < self.spec.block,
            some_blind=first < last or begin - starts[first] < self.spec.block - 1,
            scored=self.spec.selection_blocks(max(seen)) > self.spec.selected,
            shape=(at, end - begin),
        )

    def tiles_from(self, first: int) -> list[Tile]:
        """Return the tiles of the queries from `first` on."""
        if first == 0:
            return self.tiles
        if first not in self._tiles_from:
            self._tiles_from[first] = [
                tile if tile.begin >= first else self._tile(first, tile.end)
                for tile in self.tiles
                if tile.end > first
            ]
        return self._tiles_from[first]

    def _remember(self, name: str, tile: Tile, build: Callable[[], Tensor]) -> Tensor:
        """Keep masks for the next layer and the backward pass, as long as they are small in sum."""
        key = (name, tile.shape)
        if key not in self._masks:
            mask = build()
            self._mask_bytes += mask.nbytes
            if self._mask_bytes > MASK_CACHE_BYTES:
                self._mask_bytes -= mask.nbytes
                return mask
            self._masks[key] = mask
        return self._masks[key]

    def additive(self, visible: Tensor) -> Tensor:
        """Turn booleans into 0 where visible and -inf elsewhere, fp32."""
        return torch.where(visible, self._zero, self._minus_inf)

    def window_mask(self, tile: Tile) -> Tensor:
        """Additive fp32 mask [1, 1, B, C] over keys [tile.window, tile.end)."""

        def build() -> Tensor:
            t = self._tokens[tile.begin : tile.end, None]
            low = torch.maximum(
                self._doc_start[tile.begin : tile.end, None], t - (self.spec.window - 1)
            )
            s = self._tokens[None, tile.window : tile.end]
            return self.additive((s >= low) & (s <= t))[None, None]

        return self._remember("window", tile, build)

    def selected_columns(self, tile: Tile) -> slice:
        """Slots from the tile's first block to its last query."""
        return slice(tile.block_begin * self.spec.select, tile.slot_end)

    def compressed_columns(self, tile: Tile) -> slice:
        """Compressed slots [block_begin·l'/d, block_end·l'/d) of a tile."""
        return slice(tile.block_begin * self.slots_per_block, tile.block_end * self.slots_per_block)

    def compressed_mask(self, tile: Tile) -> Tensor:
        """Additive fp32 mask [1, 1, B, C] over `compressed_columns`, by i·d + l - 1 <= t."""

        def build() -> Tensor:
            columns = self.compressed_columns(tile)
            t = self._tokens[tile.begin : tile.end, None]
            low = self._doc_start[tile.begin : tile.end, None]
            first, last = (
                self._compressed_first[None, columns],
                self._compressed_last[None, columns],
            )
            return self.additive((first >= low) & (last <= t))[None, None]

        return self._remember("compressed", tile, build)

    def blocks_of(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Blocks that a query may select and those it must: booleans [B, J] of the tile."""
        own = self._block_of_token[tile.begin : tile.end, None]
        low = self._block_low[tile.begin : tile.end, None]
        j = self._block_numbers[None, tile.block_begin : tile.block_end]
        allowed = (j >= low) & (j <= own)
        forced = allowed & ((j < low + self.spec.initial) | (j > own - self.spec.local))
        return allowed, forced

    def rank_bias(self, tile: Tile) -> Tensor:
        """`selection.rank_bias` of the tile, fp32 [B, J]."""
        return self._remember("rank", tile, lambda: rank_bias(*self.blocks_of(tile)))

    def block_distance(self, tile: Tile) -> Tensor:
        """Tokens from the start of each of the tile's blocks to each query, int64 [B, J]."""
        slot = self.slot_of_token[tile.begin : tile.end, None]
        j = self._block_numbers[None, tile.block_begin : tile.block_end]
        return slot - j * self.spec.select

    def selected_mask(self, tile: Tile, chosen_GBJ: Tensor | None) -> Tensor:
        """Additive fp32 mask over `selected_columns`, causal inside the query's own block.

        Args:
            tile: the queries.
            chosen_GBJ: selected blocks; None when every allowed block is selected.

        Returns:
            [G, 1, B, C], or [1, 1, B, C] without `chosen_GBJ`.
        """
        if chosen_GBJ is None:
            return self._remember(
                "causal", tile, lambda: self._token_mask(tile, self.blocks_of(tile)[0][None])
            )
        return self._token_mask(tile, chosen_GBJ)

    def _token_mask(self, tile: Tile, chosen_GBJ: Tensor) -> Tensor:
        select = self.spec.select
        mask = self.additive(chosen_GBJ).repeat_interleave(select, dim=-1)
        mask = mask[..., : tile.slot_end - tile.block_begin * select]
        # A query's future slots lie at or after the block of the tile's first query.
        future = self._remember("future", tile, lambda: self._future(tile))
        mask[..., mask.shape[-1] - future.shape[-1] :].add_(future)
        return mask[:, None]

    def _future(self, tile: Tile) -> Tensor:
        """Additive fp32 mask [B, tail] of the slots from the first query's block on."""
        starts, _ = self._docs
        doc = bisect_right(starts, tile.begin) - 1
        first = self._first_block[doc] + (tile.begin - starts[doc]) // self.spec.select
        slots = self._slot_numbers[None, first * self.spec.select : tile.slot_end]
        return self.additive(slots <= self.slot_of_token[tile.begin : tile.end, None])


_plans: WeakKeyDictionary[Documents, dict[tuple[NsaSpec, int], Plan]] = WeakKeyDictionary()


def plan_for(docs: Documents, spec: NsaSpec, heads: int) -> Plan:
    """Return the layout of these documents, made once and shared by all layers and both passes.

    Args:
        docs: the documents; the layout lives as long as this object.
        spec: the sizes.
        heads: query heads H; with the longest document they bound the tile on a GPU.
    """
    tile = CPU_TILE
    if docs.device.type != "cpu":
        # Fewer, larger tiles launch fewer kernels; one tile's fp32 scores stay near 1 GiB.
        tile = min(max(GPU_SCORE_BYTES // (4 * heads * docs.longest) // 64 * 64, 64), 1024)
    plans = _plans.setdefault(docs, {})
    if (spec, tile) not in plans:
        plans[spec, tile] = Plan(docs, spec, tile)
    return plans[spec, tile]
