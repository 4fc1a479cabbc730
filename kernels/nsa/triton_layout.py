"""Index tensors that let one grid of tiles serve any packing of documents.

Documents are laid end to end, so what a token may see is always an interval, and both its ends
never decrease along the packed sequence. A tile of neighbouring tokens therefore needs only the
first row's low end and the last row's high end, and tiles may straddle documents.

Compressed blocks are numbered so that the selected block b of the whole pack owns the slots
`ratio * b ... ratio * b + ratio - 1`: each document is padded to whole selected blocks, and a slot
without a full compressed block is zero and visible to nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.documents import Documents
from kernels.nsa.spec import NsaSpec
from kernels.transfer import to_device

_CACHE = "_nsa_triton_layouts"


@dataclass(frozen=True)
class PackedLayout:
    """Where everything lies in a pack of T tokens, NB selected blocks, NC compressed slots.

    Attributes:
        tokens: int32 [4, T]: first token of the token's document, first selected block of its
            document, compressed slots visible to it [low end, high end).
        window: int32 [4, T]: tokens visible through the window [low end, high end), and the tokens
            that see this one through it [low end, high end).
        slots: int32 [5, NC]: first token of the slot's chunk, first token of its compressed block
            or -1, first and end of the tokens that see it, first slot of its document.
        blocks: int32 [2, NB]: first token of the selected block and end of its tokens.
        n_blocks: NB. n_slots: NC. longest_blocks: selected blocks of the longest document.
        extra_blocks: bound on how far NB exceeds T / select, one partial block per document.
    """

    tokens: Tensor
    window: Tensor
    slots: Tensor
    blocks: Tensor
    n_blocks: int
    n_slots: int
    longest_blocks: int
    extra_blocks: int


def packed_layout(docs: Documents, spec: NsaSpec) -> PackedLayout:
    """Return the layout of these documents on their device; built on the host, once per `docs`."""
    cache: dict[NsaSpec, PackedLayout] = docs.__dict__.setdefault(_CACHE, {})
    if spec not in cache:
        cache[spec] = _build(docs, spec)
    return cache[spec]


def _build(docs: Documents, spec: NsaSpec) -> PackedLayout:
    ratio = spec.select // spec.stride
    length = torch.tensor(docs.lengths)
    start = torch.tensor(docs.starts)
    n_blocks = (length + spec.select - 1) // spec.select
    first_block = n_blocks.cumsum(0) - n_blocks
    n_compressed = torch.where(
        length >= spec.block, (length - spec.block) // spec.stride + 1, torch.zeros_like(length)
    )

    document = torch.repeat_interleave(length)
    token = torch.arange(docs.total)
    position = token - start[document]
    seen = torch.where(
        position >= spec.block - 1,
        (position - spec.block + 1) // spec.stride + 1,
        torch.zeros_like(position),
    )
    first_slot = first_block[document] * ratio
    tokens = torch.stack([start[document], first_block[document], first_slot, first_slot + seen])
    window = torch.stack(
        [
            torch.maximum(start[document], token - spec.window + 1),
            token + 1,
            token,
            torch.minimum(token + spec.window, (start + length)[document]),
        ]
    )

    block_document = torch.repeat_interleave(n_blocks)
    block = torch.arange(len(block_document))
    block_token = start[block_document] + (block - first_block[block_document]) * spec.select
    block_end = torch.minimum(block_token + spec.select, (start + length)[block_document])

    slot_document = torch.repeat_interleave(n_blocks * ratio)
    slot = torch.arange(len(slot_document))
    local = slot - first_block[slot_document] * ratio
    chunk_token = start[slot_document] + local * spec.stride
    real = local < n_compressed[slot_document]
    end = (start + length)[slot_document]
    # A padding slot's interval is empty but keeps both ends non-decreasing.
    first_query = torch.where(real, chunk_token + spec.block - 1, end)
    slots = torch.stack(
        [
            chunk_token,
            torch.where(real, chunk_token, -torch.ones_like(slot)),
            first_query,
            end,
            first_block[slot_document] * ratio,
        ]
    )

    sizes = [tokens.numel(), window.numel(), slots.numel(), 2 * len(block)]
    flat = torch.cat(
        [tokens.flatten(), window.flatten(), slots.flatten(), block_token, block_end]
    ).to(torch.int32)
    parts = torch.split(to_device(flat, docs.device), sizes)
    return PackedLayout(
        tokens=parts[0].view(4, -1),
        window=parts[1].view(4, -1),
        slots=parts[2].view(5, -1),
        blocks=parts[3].view(2, -1),
        n_blocks=len(block),
        n_slots=len(slot),
        longest_blocks=int(n_blocks.max()),
        extra_blocks=len(docs.lengths),
    )
