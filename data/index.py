"""`index.json` of a built corpus: what it holds, and checks of the files beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
INDEX = "index.json"
TOKENIZER = "tokenizer.model"


class DataError(ValueError):
    """A corpus cannot be used; the message names the file, what was found and the remedy."""


class StoreAwayError(DataError):
    """An object store was away for longer than `data.patience`; another moment may do."""


@dataclass(frozen=True)
class Shard:
    """One shard file: its name in the split's folder, size in bytes, SHA-256, samples in it."""

    file: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Split:
    """What one split holds.

    Attributes:
        documents: number of documents.
        bytes: UTF-8 bytes of their text.
        tokens: tokens, with a begin and an end per document.
        samples: packed samples.
        document_tokens: quantiles of the documents' lengths in tokens.
        gzip_bits_per_byte: of all its text end to end under `gzip -9`; None where not measured.
        index_sha256: SHA-256 of the split's own index file.
        shards: its files.
    """

    documents: int
    bytes: int
    tokens: int
    samples: int
    document_tokens: dict[str, int]
    gzip_bits_per_byte: float | None
    index_sha256: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Index:
    """A built corpus.

    Attributes:
        name: of the folder it was built in.
        seq_len: S, inputs per sample.
        vocab_size: V, ids of the tokenizer.
        tokenizer_sha256: of the tokenizer's model file.
        compression: of the shards.
        source: where the documents came from, what was skipped.
        settings: what the build was asked for; a finished build is reused for equal settings only.
        splits: by name.
    """

    name: str
    seq_len: int
    vocab_size: int
    tokenizer_sha256: str
    compression: str
    source: dict[str, Any]
    settings: dict[str, Any]
    splits: dict[str, Split]

    @property
    def identity(self) -> str:
        """SHA-256 of what the shards and the tokenizer hold; names the corpus wherever it is."""
        parts = [str(self.seq_len), self.tokenizer_sha256]
        parts += [f"{name}:{self.splits[name].index_sha256}" for name in sorted(self.splits)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def to_json(self) -> bytes:
        """Return the file's content."""
        text = json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1)
        return text.encode() + b"\n"

    @classmethod
    def from_json(cls, content: bytes, where: str) -> Index:
        """Parse the file `where`; raises DataError when it is not an index of this schema."""
        try:
            fields = json.loads(content)
            schema = fields.pop("schema")
        except (ValueError, KeyError, AttributeError, TypeError) as e:
            raise DataError(
                f"{where} is not the index of a corpus ({type(e).__name__}: {e}): give a folder "
                f"that `tiny-onn data build` has made"
            ) from e
        if schema != SCHEMA:
            raise DataError(
                f"{where} has schema {schema}, this version reads {SCHEMA}: build the corpus anew "
                f"with `tiny-onn data build`"
            )
        try:
            splits = {
                name: Split(**{**s, "shards": tuple(Shard(**shard) for shard in s["shards"])})
                for name, s in fields.pop("splits").items()
            }
            return cls(**fields, splits=splits)
        except (TypeError, KeyError, AttributeError) as e:
            raise DataError(f"{where} is damaged ({e}): build the corpus anew") from e


def read_index(folder: Path) -> Index:
    """Read a folder's index.

    Raises:
        DataError: there is none, or it is not one.
    """
    path = folder / INDEX
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as e:
        raise DataError(
            f"{path} does not exist: build the corpus with\n  tiny-onn data build --input "
            f"DIR|GLOB|FILE|stdlib --out {folder}"
        ) from e
    return Index.from_json(content, str(path))


def rebuild_hint(index: Index, folder: str) -> str:
    """Return how to get this corpus whole again."""
    return (
        f"copy it there again, or remove the folder and run\n  tiny-onn data build --input "
        f"{inputs(index)} --out {folder} --seq_len {index.seq_len}"
    )


def inputs(index: Index) -> str:
    """Return what a corpus was built from as the command line takes it (names, no folders)."""
    return shlex.join(index.source.get("inputs", ["INPUT"]))


def check_files(index: Index, folder: Path, split: str) -> None:
    """Check that the files of a split are there in full size, without reading the shards.

    Raises:
        DataError: a file is missing or has another size, or the split's index is another one.
    """
    at = folder / split
    hint = rebuild_hint(index, str(folder))
    expected = index.splits[split]
    split_index = at / INDEX
    if not split_index.is_file():
        raise DataError(f"{split_index} is missing: {hint}")
    found = hashlib.sha256(split_index.read_bytes()).hexdigest()
    if found != expected.index_sha256:
        raise DataError(
            f"{split_index} has SHA-256 {found[:12]}…, {folder / INDEX} says "
            f"{expected.index_sha256[:12]}…: the two are from different builds; {hint}"
        )
    for shard in expected.shards:
        path = at / shard.file
        try:
            size = path.stat().st_size
        except FileNotFoundError as e:
            raise DataError(f"{path} is missing: {hint}") from e
        if size != shard.bytes:
            word = "cut short" if size < shard.bytes else "too long"
            raise DataError(
                f"{path} is {word}: {size:,} bytes of {shard.bytes:,} that the index says; {hint}"
            )


def check_hashes(
    index: Index, folder: Path, split: str, progress: Callable[[int], None] | None = None
) -> None:
    """Read every shard of a split and compare hashes; raises DataError naming the first bad one.

    Args:
        index: of the corpus.
        folder: where it is.
        split: name of the split.
        progress: called with the bytes of every finished shard.
    """
    check_files(index, folder, split)
    for shard in index.splits[split].shards:
        path = folder / split / shard.file
        check_hash(path, shard.sha256, rebuild_hint(index, str(folder)))
        if progress is not None:
            progress(shard.bytes)


def check_hash(path: Path, expected: str, hint: str) -> None:
    """Compare a file's SHA-256; raises DataError when it is another one."""
    with path.open("rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != expected:
        raise DataError(
            f"{path} is damaged: SHA-256 {found[:12]}… instead of {expected[:12]}…; {hint}"
        )
