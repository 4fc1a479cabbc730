"""Documents end to end in samples of a fixed length, and samples back into training batches.

A split is one long stream: begin, a document's tokens, end, the next begin … Sample k holds the
S + 1 stream tokens from k·S on; neighbours share one token, so that, as inputs `[:S]` and labels
`[1:]`, every token of the stream except the begin tokens is predicted exactly once. Documents never
span samples: where a sample starts inside a document, a new packed document starts there.

A stored sample has these columns:

| column | encoding | |
|---|---|---|
| `id` | int64 | number of the sample in its split |
| `starts` | bytes (uint32 array) | where in 0…S of the S + 1 tokens a document begins |
| `tokens` | uint16 or uint32 [S + 1] | token ids; after `used` only padding |
| `used` | int64 | tokens before the padding: S + 1 except in the last sample |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that predicts nothing (torch's cross-entropy skips it)."""


def columns(seq_len: int, vocab_size: int) -> dict[str, str]:
    """Return the MDS columns of samples of `seq_len` inputs."""
    return {
        "id": "int",
        "starts": "bytes",
        "tokens": f"ndarray:{token_dtype(vocab_size).name}:{seq_len + 1}",
        "used": "int",
    }


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class Packer:
    """Turns documents into samples, holding no more than one document and one sample."""

    def __init__(self, seq_len: int, vocab_size: int, bos: int, eos: int, pad: int) -> None:
        """Pack into samples of `seq_len` + 1 tokens."""
        self.seq_len = seq_len
        self.documents = 0
        self.tokens = 0
        self.samples = 0
        self._dtype = token_dtype(vocab_size)
        self._bos, self._eos, self._pad = bos, eos, pad
        self._pending = np.empty(0, self._dtype)
        self._starts: list[int] = []

    def add(self, ids: npt.NDArray[np.integer[Any]]) -> Iterator[dict[str, Any]]:
        """Append a document (without begin and end); yield the samples that this completes."""
        self.documents += 1
        self.tokens += len(ids) + 2
        self._starts.append(len(self._pending))
        ends = np.array([self._bos, self._eos], self._dtype)
        parts = (self._pending, ends[:1], ids.astype(self._dtype), ends[1:])
        self._pending = np.concatenate(parts)
        while len(self._pending) > self.seq_len:
            yield self._emit(self.seq_len + 1)

    def finish(self) -> Iterator[dict[str, Any]]:
        """Yield the last sample, padded, if a token is left that no sample predicts yet."""
        if len(self._pending) > 1:
            yield self._emit(len(self._pending))
        self._pending = self._pending[:0]

    def _emit(self, used: int) -> dict[str, Any]:
        tokens = np.full(self.seq_len + 1, self._pad, self._dtype)
        tokens[:used] = self._pending[:used]
        starts = [s for s in self._starts if s < used]
        self._pending = self._pending[self.seq_len :]
        self._starts = [s - self.seq_len for s in self._starts if s >= self.seq_len]
        sample = {
            "id": self.samples,
            "starts": np.array(starts, np.uint32).tobytes(),
            "tokens": tokens,
            "used": used,
        }
        self.samples += 1
        return sample


@dataclass(frozen=True)
class Batch:
    """One micro-batch, its samples packed end to end: T = samples · seq_len tokens.

    Where ranks share a micro-batch, each has a part of its tokens: ids, labels and n_labels are the
    part's, everything else describes the whole.

    Attributes:
        ids_T: int64 [T], CPU.
        labels_T: int64 [T], CPU: the next token of the same document, IGNORED at a document's last
            token and on padding.
        lengths: tokens of each packed document, sum T; none spans two samples. Padding counts as a
            document of its own.
        sample_ids: number of each sample in its split; -1 for a sample that is all padding.
        n_labels: how many labels are not IGNORED.
    """

    ids_T: Tensor
    labels_T: Tensor
    lengths: list[int]
    sample_ids: list[int]
    n_labels: int

    def part(self, part: int, parts: int) -> Batch:
        """Return tokens [T·part // parts, T·(part + 1) // parts) with the labels of the whole."""
        if parts == 1:
            return self
        T = self.ids_T.shape[0]
        own = slice(T * part // parts, T * (part + 1) // parts)
        labels = self.labels_T[own]
        return replace(
            self, ids_T=self.ids_T[own], labels_T=labels, n_labels=int((labels != IGNORED).sum())
        )


def to_batch(samples: Sequence[dict[str, Any]]) -> Batch:
    """Pack stored samples into one micro-batch."""
    tokens = np.stack([s["tokens"] for s in samples]).astype(np.int64)
    labels = tokens[:, 1:].copy()
    seq_len = labels.shape[1]
    lengths: list[int] = []
    for row, sample in zip(labels, samples, strict=True):
        cuts = np.frombuffer(sample["starts"], np.uint32).astype(np.int64)
        used = int(sample["used"])
        if used <= seq_len:
            cuts = np.append(cuts, used)
            row[used - 1 if used else 0 :] = IGNORED
        cuts = cuts[cuts > 0]
        row[cuts - 1] = IGNORED
        inner = cuts[cuts < seq_len]
        lengths += np.diff(inner, prepend=0, append=seq_len).tolist()
    ids = np.ascontiguousarray(tokens[:, :-1]).reshape(-1)
    return Batch(
        ids_T=torch.from_numpy(ids),
        labels_T=torch.from_numpy(labels.reshape(-1)),
        lengths=lengths,
        sample_ids=[int(s["id"]) for s in samples],
        n_labels=int((labels != IGNORED).sum()),
    )


def padding_sample(seq_len: int, pad: int) -> dict[str, Any]:
    """Return a sample that holds nothing: evens out the number of batches between ranks."""
    tokens = np.full(seq_len + 1, pad, np.int64)
    return {"id": -1, "starts": b"", "tokens": tokens, "used": 0}
