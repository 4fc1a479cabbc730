"""Open a built corpus, in a local folder or in an object store, and check it before it is used."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from data.config import DataConfig, node_folder
from data.index import (
    INDEX,
    TOKENIZER,
    DataError,
    Index,
    StoreAwayError,
    check_files,
    check_hash,
    check_hashes,
    inputs,
    read_index,
    rebuild_hint,
)
from data.tokenizer import Tokenizer


def is_remote(path: str) -> bool:
    """Tell whether a corpus is in an object store rather than in a folder."""
    return "://" in path


@dataclass(frozen=True)
class StoredCorpus:
    """A corpus that has been opened and checked.

    Attributes:
        path: folder or address, as configured.
        index: what it holds.
        tokenizer: its tokenizer.
        folder: local folder with index and tokenizer; the shards too unless `fetched`.
        fetched: whether shards are brought into `folder` as they are needed, because the corpus is
            remote, or compressed and must not be unpacked in place, or to be staged.
        patience: seconds for which the object store may fail or be away.
    """

    path: str
    index: Index
    tokenizer: Tokenizer
    folder: Path
    fetched: bool
    patience: float = 0.0

    @property
    def vocab_size(self) -> int:
        """V, number of ids."""
        return self.tokenizer.size

    def shards_at(self, split: str) -> str:
        """Return the folder or address of a split's shards.

        Raises:
            DataError: there is no such split.
        """
        if split not in self.index.splits:
            raise DataError(
                f"{self.path} has no split '{split}', only {', '.join(self.index.splits)}"
            )
        if is_remote(self.path):
            return f"{self.path.rstrip('/')}/{split}"
        return str(Path(self.path).resolve() / split)

    def check(self, splits: list[str], hashes: bool = False) -> None:
        """Check the shard files of a local corpus: present, full size and, if asked, their hashes.

        Shards of a remote corpus are checked by hash when they are fetched.

        Raises:
            DataError: a file is missing, cut short or changed.
        """
        for split in splits:
            self.shards_at(split)
            if is_remote(self.path):
                continue
            if hashes:
                check_hashes(self.index, Path(self.path), split)
            else:
                check_files(self.index, Path(self.path), split)


def open_path(
    path: str, cache: str = "", stage: bool = False, patience: float = 0.0
) -> StoredCorpus:
    """Open a corpus, whatever its sequence length, and check its index and its tokenizer.

    Args:
        path: folder or address.
        cache: see DataConfig.
        stage: see DataConfig.
        patience: see DataConfig.

    Raises:
        DataError: no corpus there, one of another version, or a tokenizer that is not the one its
            shards were made with; the message says what to do.
    """
    root = node_folder(cache)
    if is_remote(path):
        return _open_remote(path, root, patience)
    return _open_local(path, root, stage)


def open_corpus(config: DataConfig) -> StoredCorpus:
    """Open the corpus that a configuration names, and check that it is what the latter means.

    Raises:
        DataError: as `open_path`, or a corpus of another sequence length.
    """
    corpus = open_path(config.path, config.cache, config.stage, config.patience)
    index = corpus.index
    if index.seq_len != config.seq_len:
        raise DataError(
            f"{config.path} was packed for seq_len {index.seq_len}, the configuration says "
            f"{config.seq_len}: set data.seq_len to {index.seq_len}, or build another corpus with\n"
            f"  tiny-onn data build --input {inputs(index)} "
            f"--out {config.path}-{config.seq_len} --seq_len {config.seq_len}"
        )
    return corpus


def fetch(
    address: str, destination: Path, expected: str | None = None, patience: float = 0.0
) -> None:
    """Download one file of an object store, complete or not at all.

    Args:
        address: `s3://bucket/key` (S3_ENDPOINT_URL names an endpoint other than Amazon's).
        destination: where to put it; its folder is made.
        expected: SHA-256 that it must have.
        patience: seconds for which the store may fail or be away.

    Raises:
        StoreAwayError: the store failed or was away for all that time.
        DataError: it cannot be fetched, or is not what was expected.
    """
    from data.patient import TransientError, downloader

    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".fetch-") as folder:
        part = Path(folder, destination.name)
        try:
            source = downloader(address, patience)
            source.download(address, str(part))
            source.clean_up()
        except Exception as e:
            endpoint = os.environ.get("S3_ENDPOINT_URL")
            kind = StoreAwayError if isinstance(e, TransientError) else DataError
            raise kind(
                f"cannot fetch {address}: {e} (endpoint: {endpoint or 'the default'}; see that the "
                f"address is right and that credentials are set, AWS_ACCESS_KEY_ID and so on)"
            ) from e
        if expected is not None:
            check_hash(part, expected, f"fetched from {address}: upload the corpus again")
        part.rename(destination)


def _open_local(path: str, cache: Path, stage: bool) -> StoredCorpus:
    folder = Path(path).resolve()
    index = read_index(folder)
    model = folder / TOKENIZER
    if not model.is_file():
        raise DataError(f"{model} is missing: {rebuild_hint(index, str(folder))}")
    tokenizer = _checked(Tokenizer.load(model), index, str(model), str(folder))
    fetched = stage or index.compression != "none"
    local = cache / f"{index.name}-{index.identity[:16]}" if fetched else folder
    return StoredCorpus(path, index, tokenizer, local, fetched)


def _open_remote(path: str, cache: Path, patience: float) -> StoredCorpus:
    root = path.rstrip("/")
    cache.mkdir(parents=True, exist_ok=True)
    # Always the current index: what is cached under another identity is of an older corpus.
    with tempfile.TemporaryDirectory(dir=cache, prefix=".index-") as folder:
        fetch(f"{root}/{INDEX}", Path(folder, INDEX), patience=patience)
        content = Path(folder, INDEX).read_bytes()
    index = Index.from_json(content, f"{root}/{INDEX}")
    local = cache / f"{index.name}-{index.identity[:16]}"
    model = local / TOKENIZER
    if not model.exists():
        fetch(f"{root}/{TOKENIZER}", model, patience=patience)
    tokenizer = _checked(Tokenizer.load(model), index, f"{root}/{TOKENIZER}", root)
    return StoredCorpus(path, index, tokenizer, local, fetched=True, patience=patience)


def _checked(tokenizer: Tokenizer, index: Index, where: str, root: str) -> Tokenizer:
    if tokenizer.hash != index.tokenizer_sha256:
        raise DataError(
            f"{where} is not the tokenizer that the shards were made with: SHA-256 "
            f"{tokenizer.hash[:12]}… ({tokenizer.size} ids) instead of "
            f"{index.tokenizer_sha256[:12]}… ({index.vocab_size} ids); put the right one back, or "
            f"{rebuild_hint(index, root)}"
        )
    return tokenizer
