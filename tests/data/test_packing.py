"""Packed samples must predict every token but the begins exactly once, never across documents."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.packing import IGNORED, Packer, padding_sample, to_batch, token_dtype

BOS, EOS, PAD, VOCAB = 1, 2, 3, 1000


def pack(documents: list[list[int]], seq_len: int) -> list[dict[str, Any]]:
    packer = Packer(seq_len, VOCAB, BOS, EOS, PAD)
    samples = [s for d in documents for s in packer.add(np.array(d, np.int32))]
    samples += packer.finish()
    assert packer.documents == len(documents)
    assert packer.tokens == sum(len(d) + 2 for d in documents)
    assert packer.samples == len(samples)
    return samples


DOCUMENTS = st.lists(st.lists(st.integers(4, VOCAB - 1), max_size=40), min_size=1, max_size=12)


@given(documents=DOCUMENTS, seq_len=st.integers(1, 17), group=st.integers(1, 4))
def test_every_token_is_predicted_once_from_its_own_document(
    documents: list[list[int]], seq_len: int, group: int
) -> None:
    samples = pack(documents, seq_len)
    predicted: list[int] = []
    for first in range(0, len(samples), group):
        batch = to_batch(samples[first : first + group])
        ids, labels = batch.ids_T.tolist(), batch.labels_T.tolist()
        assert sum(batch.lengths) == len(ids) == len(labels) == seq_len * len(batch.sample_ids)
        assert batch.n_labels == sum(label != IGNORED for label in labels)
        start = 0
        for length in batch.lengths:
            assert length >= 1 and start // seq_len == (start + length - 1) // seq_len
            inside = labels[start : start + length]
            # Within a document every label is the next input.
            assert inside[:-1] == ids[start + 1 : start + length] or set(inside) == {IGNORED}
            assert BOS not in ids[start + 1 : start + length]
            start += length
        predicted += [label for label in labels if label != IGNORED]
    assert predicted == [t for d in documents for t in [*d, EOS]]


def test_a_document_starts_at_its_begin_and_where_a_sample_cuts_it() -> None:
    # Stream: B 10 11 12 E | B 20 E B 30 31 E, cut every 4 tokens.
    batch = to_batch(pack([[10, 11, 12], [20], [30, 31]], 4))
    assert batch.ids_T.tolist() == [1, 10, 11, 12, 2, 1, 20, 2, 1, 30, 31, 2]
    x = IGNORED
    assert batch.labels_T.tolist() == [10, 11, 12, 2, x, 20, 2, x, 30, 31, 2, x]
    assert batch.lengths == [4, 1, 3, 4]
    assert batch.sample_ids == [0, 1, 2]


def test_padding_has_no_labels_and_is_a_document_of_its_own() -> None:
    batch = to_batch(pack([[10, 11], [20]], 5))
    assert batch.ids_T.tolist() == [1, 10, 11, 2, 1, 20, 2, 3, 3, 3]
    assert batch.labels_T.tolist() == [10, 11, 2, IGNORED, 20, 2] + [IGNORED] * 4
    assert batch.lengths == [4, 1, 2, 3]


def test_a_sample_of_padding_has_no_label_and_no_number() -> None:
    batch = to_batch([padding_sample(6, PAD)])
    assert batch.ids_T.tolist() == [PAD] * 6
    assert batch.labels_T.tolist() == [IGNORED] * 6
    assert (batch.lengths, batch.sample_ids, batch.n_labels) == ([6], [-1], 0)


def test_batches_are_int64_on_the_host() -> None:
    batch = to_batch(pack([[5] * 30], 8))
    for tensor in (batch.ids_T, batch.labels_T):
        assert tensor.dtype == torch.int64 and tensor.device.type == "cpu"


@pytest.mark.parametrize(("vocab", "name"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_are_stored_in_the_smallest_type(vocab: int, name: str) -> None:
    assert token_dtype(vocab).name == name


@pytest.mark.parametrize("parts", [1, 2, 4, 5, 20])
def test_parts_are_the_batch_with_the_labels_it_had(parts: int) -> None:
    whole = to_batch(pack([[10, 11, 12], [20], [30, 31], list(range(40, 60))], 13))
    pieces = [whole.part(part, parts) for part in range(parts)]
    assert torch.equal(torch.cat([p.ids_T for p in pieces]), whole.ids_T)
    assert torch.equal(torch.cat([p.labels_T for p in pieces]), whole.labels_T)
    assert sum(p.n_labels for p in pieces) == whole.n_labels
    assert all(p.lengths == whole.lengths and p.sample_ids == whole.sample_ids for p in pieces)
    sizes = [p.ids_T.shape[0] for p in pieces]
    assert max(sizes) - min(sizes) <= 1
