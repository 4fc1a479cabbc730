"""Documents → tokenizer → token ids → packed samples → hashed MDS shards, in bounded memory.

The result depends on the documents and the settings only, byte for byte, not on the number of
processes. It is written to a hidden folder beside the target and renamed at the very end: a build
that was killed never looks like a finished one, and the next build clears its remains away.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import heapq
import json
import os
import shutil
import time
import uuid
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data.config import BuildConfig
from data.corpus import Corpus
from data.encode_pool import EncodePool
from data.index import INDEX, TOKENIZER, DataError, Index, Shard, Split, read_index
from data.packing import Packer, columns
from data.progress import progress, say
from data.streaming_shim import MDSWriter
from data.tokenizer import Ids, Tokenizer

TRAIN, VALIDATION = "train", "validation"
BATCH_BYTES = 1 << 18
"""Text that goes to a tokenizer process at a time."""

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)


def build(config: BuildConfig, out: str | Path, seq_len: int) -> Index:
    """Build a corpus in the folder `out`, or take the finished one that is there.

    Args:
        config: what to build from and how.
        out: folder to make; its parent is made too.
        seq_len: S, tokens per packed sample.

    Returns:
        What the corpus holds.

    Raises:
        DataError: `out` holds something else: a corpus with other settings, or other files.
        ValueError: an input that cannot be read, a vocabulary size that does not fit it, or samples
            too short to predict anything.
        OSError: no space, no permission.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, got {seq_len}")
    out = Path(out)
    corpus = Corpus(config.input, config.text_key)
    reused = Tokenizer.load(config.tokenizer) if config.tokenizer else None
    settings = _settings(config, corpus, seq_len, reused)
    if (out / INDEX).exists():
        return _finished(out, settings)
    if out.exists() and any(out.iterdir()):
        raise DataError(
            f"{out} exists and is not a finished corpus (no {INDEX}): choose another --out, or "
            f"empty it"
        )
    with _workspace(out) as folder:
        tokenizer = reused or _train_tokenizer(config, corpus)
        tokenizer.save(folder / TOKENIZER)
        index = Index(
            name=out.name,
            seq_len=seq_len,
            vocab_size=tokenizer.size,
            tokenizer_sha256=tokenizer.hash,
            compression=config.compression,
            source=corpus.describe(),
            settings=settings,
            splits=_write_splits(config, corpus, tokenizer, folder, seq_len),
        )
        index.source["skipped"] = {
            "not_utf8": corpus.skipped.not_utf8,
            "empty": corpus.skipped.empty,
            "examples": corpus.skipped.examples,
        }
        (folder / INDEX).write_bytes(index.to_json())
        return _publish(folder, out, index)


def is_validation(digest: bytes, fraction: float) -> bool:
    """Tell whether the document with this hash is held out."""
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def _digest(text: bytes) -> bytes:
    """Hash of a document: the first half decides its split, the second whether it is sampled."""
    return hashlib.blake2b(text, digest_size=16).digest()


def _settings(
    config: BuildConfig, corpus: Corpus, seq_len: int, reused: Tokenizer | None
) -> dict[str, Any]:
    described = corpus.describe()
    settings: dict[str, Any] = {
        "inputs": described["inputs"],
        "fingerprint of the input files": described["fingerprint"],
        "text_key": config.text_key,
        "seq_len": seq_len,
        "validation_fraction": config.validation_fraction,
        "compression": config.compression,
        "shard_mb": config.shard_mb,
    }
    if "python" in described:
        settings["python"] = described["python"]
    if reused:
        settings["tokenizer"] = reused.hash
    else:
        settings["vocab_size"] = config.vocab_size
        settings["tokenizer_sample_mb"] = config.tokenizer_sample_mb
    return settings


def _finished(out: Path, settings: dict[str, Any]) -> Index:
    index = read_index(out)
    missing = "not set"
    differences = [
        f"{key}: {index.settings.get(key, missing)} there, {settings.get(key, missing)} asked for"
        for key in sorted(settings.keys() | index.settings.keys())
        if index.settings.get(key, missing) != settings.get(key, missing)
    ]
    if differences:
        lines = "\n  ".join(differences)
        raise DataError(
            f"{out} holds a finished corpus with other settings:\n  {lines}\n"
            f"Choose another --out, ask for those settings, or remove the folder: rm -r {out}"
        )
    say(f"{out} is already built with these settings; using it")
    return index


def _train_tokenizer(config: BuildConfig, corpus: Corpus) -> Tokenizer:
    """Train on the documents of the training split with the smallest hashes, up to the sample size.

    That draws evenly from the whole corpus in one pass and in bounded memory.
    """
    limit = config.tokenizer_sample_mb * 1_000_000
    heap: list[tuple[int, int, bytes]] = []
    size = 0
    with progress("drawing the tokenizer's sample", corpus.disk_bytes) as advance:
        for number, document in enumerate(corpus):
            text = document.text.encode()
            digest = _digest(text)
            advance(corpus.read_bytes)
            priority = -int.from_bytes(digest[8:], "big")
            full = size >= limit and priority < heap[0][0]
            if full or is_validation(digest, config.validation_fraction):
                continue
            heapq.heappush(heap, (priority, number, text[:limit]))
            size += len(text[:limit])
            while size - len(heap[0][2]) >= limit:
                size -= len(heapq.heappop(heap)[2])
    started = time.monotonic()
    sample = [text for _, _, text in sorted(heap, key=lambda entry: entry[1])]
    # A document cut at the limit may end inside a character.
    tokenizer = Tokenizer.train((t.decode(errors="ignore") for t in sample), config.vocab_size)
    say(f"trained a tokenizer of {tokenizer.size:,} ids in {time.monotonic() - started:.1f} s")
    return tokenizer


class _SplitWriter:
    """Packs the documents of one split and writes its shards."""

    def __init__(self, config: BuildConfig, folder: Path, seq_len: int, tok: Tokenizer) -> None:
        self.folder = folder
        self.bytes = 0
        self.lengths: Counter[int] = Counter()
        self.packer = Packer(seq_len, tok.size, tok.bos_id, tok.eos_id, tok.pad_id)
        self.writer = MDSWriter(
            columns=columns(seq_len, tok.size),
            out=str(folder),
            compression="zstd:3" if config.compression == "zstd" else None,
            hashes=["sha256"],
            size_limit=config.shard_mb << 20,
        )
        self._gzip = zlib.compressobj(9, zlib.DEFLATED, 31) if folder.name == VALIDATION else None
        self._gzip_bytes = 0

    def add(self, text: bytes, ids: Ids) -> None:
        self.bytes += len(text)
        self.lengths[len(ids) + 2] += 1
        if self._gzip:
            self._gzip_bytes += len(self._gzip.compress(text))
        for sample in self.packer.add(ids):
            self.writer.write(sample)

    def finish(self) -> Split:
        for sample in self.packer.finish():
            self.writer.write(sample)
        self.writer.finish()
        content = (self.folder / INDEX).read_bytes()
        files = [(s["zip_data"] or s["raw_data"], s) for s in json.loads(content)["shards"]]
        bits = None
        if self._gzip:
            self._gzip_bytes += len(self._gzip.flush())
            bits = 8 * self._gzip_bytes / self.bytes
        return Split(
            documents=self.packer.documents,
            bytes=self.bytes,
            tokens=self.packer.tokens,
            samples=self.packer.samples,
            document_tokens=quantiles(self.lengths),
            gzip_bits_per_byte=bits,
            index_sha256=hashlib.sha256(content).hexdigest(),
            shards=tuple(
                Shard(f["basename"], f["bytes"], f["hashes"]["sha256"], s["samples"])
                for f, s in files
            ),
        )


def _write_splits(
    config: BuildConfig, corpus: Corpus, tokenizer: Tokenizer, folder: Path, seq_len: int
) -> dict[str, Split]:
    names = [TRAIN, VALIDATION] if config.validation_fraction else [TRAIN]
    writers = {n: _SplitWriter(config, folder / n, seq_len, tokenizer) for n in names}
    waiting: deque[list[bytes]] = deque()

    def batches() -> Iterator[list[bytes]]:
        for batch in _batches(document.text.encode() for document in corpus):
            waiting.append(batch)
            yield batch

    with (
        EncodePool(folder / TOKENIZER, config.processes) as pool,
        progress("tokenising", corpus.disk_bytes) as advance,
    ):
        for encoded in pool.encode(batches()):
            for text, ids in zip(waiting.popleft(), encoded, strict=True):
                held_out = is_validation(_digest(text), config.validation_fraction)
                writers[VALIDATION if held_out else TRAIN].add(text, ids)
            advance(corpus.read_bytes)
    total = sum(w.packer.documents for w in writers.values())
    for name, writer in writers.items():
        if not writer.packer.documents:
            raise DataError(
                f"no document fell into the split '{name}': {total} documents in all, "
                f"--validation_fraction {config.validation_fraction}. Give more documents (a file, "
                f"or a line of .jsonl, is one), or change the fraction"
            )
    return {name: writer.finish() for name, writer in writers.items()}


def _batches(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def quantiles(lengths: Counter[int]) -> dict[str, int]:
    """Return quantiles of counted lengths, keyed `0%` … `100%`."""
    values = np.array(sorted(lengths))
    cumulative = np.cumsum([lengths[v] for v in values.tolist()])
    at = np.ceil(np.array(QUANTILES) * cumulative[-1]).clip(1)
    found = values[np.searchsorted(cumulative, at)]
    return {f"{q:.0%}": int(v) for q, v in zip(QUANTILES, found, strict=True)}


@contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    """Make the hidden folder that a build works in; what dead builds left is removed first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.build-"
    for old in out.parent.glob(f"{prefix}*"):
        _remove_if_abandoned(old)
    folder = out.parent / f"{prefix}{uuid.uuid4().hex[:12]}"
    folder.mkdir()
    with (folder / ".lock").open("w") as lock:
        _lock(lock.fileno())
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _lock(fd: int) -> bool:
    """Take a lock that lives as long as this process; False when another process has it.

    On a file system without locks nothing is ever taken for abandoned.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EWOULDBLOCK, errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        return False
    return True


def _remove_if_abandoned(folder: Path) -> None:
    try:
        with (folder / ".lock").open("r+") as lock:
            if _lock(lock.fileno()):
                say(f"removing {folder}, left by a build that was killed")
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        # Another build made it just now, or is removing it just now: theirs either way.
        return


def _publish(folder: Path, out: Path, index: Index) -> Index:
    """Make the folder durable and give it its name, in one step."""
    for path in [*sorted(folder.rglob("*")), folder]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    try:
        folder.rename(out)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return _finished(out, index.settings)
    (out / ".lock").unlink()
    for name, split in index.splits.items():
        say(
            f"{out / name}: {split.documents:,} documents, {split.tokens:,} tokens, "
            f"{split.bytes / split.tokens:.2f} bytes per token, {split.samples:,} samples"
        )
    return index
