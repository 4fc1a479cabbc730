"""What a built corpus holds, for people: counts, lengths, decoded text, and a check of hashes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from data.index import check_hash, check_hashes
from data.progress import progress
from data.samples import Site
from data.stored import StoredCorpus, fetch, is_remote, open_path


def inspect(path: str, sample: int = 0, cache: str = "") -> dict[str, Any]:
    """Return what a corpus holds.

    Args:
        path: folder or address of the corpus.
        sample: number of the training sample to decode.
        cache: see DataConfig.

    Returns:
        JSON-like values: `name`, `seq_len`, `vocab_size`, `tokenizer_sha256`, `identity`,
        `compression`, `source`, per split under `splits` the counts, `bytes_per_token` and length
        quantiles, and under `sample` the text and pieces of one training sample.

    Raises:
        DataError: no usable corpus, or no such sample.
    """
    corpus = open_path(path, cache)
    index = corpus.index
    splits = {
        name: {
            "documents": s.documents,
            "bytes": s.bytes,
            "tokens": s.tokens,
            "samples": s.samples,
            "bytes_per_token": round(s.bytes / s.tokens, 3),
            "document_tokens": s.document_tokens,
            "gzip_bits_per_byte": s.gzip_bits_per_byte,
            "shards": len(s.shards),
            "shard_bytes": sum(shard.bytes for shard in s.shards),
        }
        for name, s in index.splits.items()
    }
    return {
        "path": path,
        "name": index.name,
        "seq_len": index.seq_len,
        "vocab_size": index.vocab_size,
        "tokenizer_sha256": index.tokenizer_sha256,
        "identity": index.identity,
        "compression": index.compression,
        "source": index.source,
        "splits": splits,
        "sample": _decoded(corpus, next(iter(index.splits)), sample),
    }


def verify(path: str, cache: str = "") -> int:
    """Read every shard of every split, compare its hash, and return how many bytes that were.

    Args:
        path: folder or address of the corpus; a remote one is downloaded shard by shard.
        cache: see DataConfig.

    Raises:
        DataError: the first file that is missing, cut short or changed.
    """
    corpus = open_path(path, cache)
    total = sum(s.bytes for split in corpus.index.splits.values() for s in split.shards)
    done = 0
    with progress(f"verifying {path}", total) as advance:

        def count(size: int) -> None:
            nonlocal done
            done += size
            advance(done)

        for name, split in corpus.index.splits.items():
            if not is_remote(path):
                check_hashes(corpus.index, Path(path).resolve(), name, count)
                continue
            for shard in split.shards:
                with tempfile.TemporaryDirectory() as folder:
                    address = f"{corpus.shards_at(name)}/{shard.file}"
                    part = Path(folder, shard.file)
                    fetch(address, part)
                    check_hash(part, shard.sha256, f"fetched from {address}: upload it again")
                count(shard.bytes)
    return done


def table(report: dict[str, Any]) -> str:
    """Lay out what `inspect` returned."""
    source = report["source"]
    skipped = source.get("skipped", {})
    python = f" (Python {source['python']})" if "python" in source else ""
    lines = [
        f"corpus      {report['name']}  ({report['path']})",
        f"identity    {report['identity'][:16]}",
        f"source      {', '.join(source['inputs'])}{python}: {source['files']:,} files, "
        f"{source['disk_bytes'] / 1e6:,.1f} MB; skipped {skipped.get('not_utf8', 0)} not UTF-8, "
        f"{skipped.get('empty', 0)} empty",
        f"tokenizer   {report['vocab_size']:,} ids, SHA-256 {report['tokenizer_sha256'][:16]}",
        f"samples     {report['seq_len']:,} tokens, compression {report['compression']}",
        "",
        f"{'split':<12}{'documents':>12}{'tokens':>16}{'bytes':>16}{'bytes/token':>13}"
        f"{'samples':>12}{'shards':>8}{'gzip -9 b/B':>13}",
    ]
    for name, s in report["splits"].items():
        gzip = s["gzip_bits_per_byte"]
        lines.append(
            f"{name:<12}{s['documents']:>12,}{s['tokens']:>16,}{s['bytes']:>16,}"
            f"{s['bytes_per_token']:>13.3f}{s['samples']:>12,}{s['shards']:>8,}"
            f"{'-' if gzip is None else f'{gzip:.3f}':>13}"
        )
    lines += ["", "tokens per document"]
    for name, s in report["splits"].items():
        quantiles = "  ".join(f"{q} {n:,}" for q, n in s["document_tokens"].items())
        lines.append(f"{name:<12}{quantiles}")
    sample = report["sample"]
    lines += [
        "",
        f"{sample['split']} sample {sample['id']}: {sample['documents']} documents, first pieces "
        f"{' '.join(sample['pieces'])}",
        sample["text"],
    ]
    return "\n".join(lines)


def _decoded(corpus: StoredCorpus, split: str, number: int, shown: int = 240) -> dict[str, Any]:
    opened = Site(0, 1).open(corpus, [split], verify_hashes=False, batch_size=1)[0]
    try:
        stored = opened[number]
    finally:
        opened.stop()
    ids = stored["tokens"][: stored["used"]].astype(np.int64)
    starts = {0, *np.frombuffer(stored["starts"], np.uint32).tolist()}
    return {
        "split": split,
        "id": int(stored["id"]),
        "documents": len(starts),
        "pieces": [repr(corpus.tokenizer.piece(i))[1:-1] for i in ids[:16].tolist()],
        "text": corpus.tokenizer.decode(ids)[:shown],
    }
