"""What can be configured about a corpus: how it is built, and how it is read."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


def node_folder(cache: str) -> Path:
    """Return the folder on this node that `data.cache` means.

    Raises:
        ValueError: it names an environment variable that this node does not have.
    """
    folder = os.path.expanduser(os.path.expandvars(cache))
    if "$" in folder:
        raise ValueError(
            f"data.cache {cache}: this node ({os.uname().nodename}) does not have that environment "
            "variable; name a folder on every node's own disk"
        )
    return Path(folder or Path(tempfile.gettempdir(), f"tiny-onn-cache-{os.geteuid()}")).resolve()


@dataclass
class BuildConfig:
    """How documents become shards.

    Attributes:
        input: folders, globs, `.jsonl`, text files (either may end in .gz or .zst), or `stdlib`,
            the source text of the running Python's standard library.
        text_key: key of the text in JSON lines.
        vocab_size: V, ids of the tokenizer to train, 4 control ids and 256 bytes included.
        tokenizer: model file of a tokenizer to reuse instead of training one.
        tokenizer_sample_mb: train the tokenizer on this many megabytes of documents, drawn evenly
            from the training split.
        validation_fraction: share of the documents held out. Which ones is decided by a hash of
            their text: equal documents are on the same side, always.
        compression: of the shards; `zstd` about halves them.
        shard_mb: size limit of a shard before compression, in megabytes.
        workers: tokenizer processes; 0 takes one per core. Never changes the result.
    """

    input: list[str] = field(default_factory=lambda: ["stdlib"])
    text_key: str = "text"
    vocab_size: int = 8192
    tokenizer: str | None = None
    tokenizer_sample_mb: int = 16
    validation_fraction: float = 0.02
    compression: Literal["none", "zstd"] = "none"
    shard_mb: int = 64
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot work, by name."""
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction must be in [0, 1), got {self.validation_fraction}"
            )
        if not 1 <= self.shard_mb < 4096:
            raise ValueError(f"shard_mb must be in 1…4095, got {self.shard_mb}")
        if self.tokenizer_sample_mb < 1:
            raise ValueError(
                f"tokenizer_sample_mb must be positive, got {self.tokenizer_sample_mb}"
            )
        # 4 control ids and 256 bytes, as above.
        if self.vocab_size < 260:
            raise ValueError(f"vocab_size must be at least 260, got {self.vocab_size}")
        if self.workers < 0:
            raise ValueError(f"workers must not be negative, got {self.workers}")

    @property
    def processes(self) -> int:
        """Tokenizer processes to start."""
        return self.workers or len(os.sched_getaffinity(0))


@dataclass
class DataConfig:
    """Where the corpus is and how it is read.

    Attributes:
        path: folder of a built corpus, or its address (`s3://bucket/folder`; another endpoint than
            Amazon's goes into the environment variable S3_ENDPOINT_URL).
        seq_len: S, tokens per sample; must be what the corpus was built with.
        train_split: split to train on.
        validation_split: split to evaluate on.
        shuffle: whether samples come in a new random order every epoch.
        shuffle_seed: of that order.
        canonical_nodes: parts that the order is woven from. More let the nodes of a large job fetch
            different shards. 0 takes 64 for a large corpus and 1 for a small one, whatever the
            world size.
        stage: copy the shards of a corpus in a folder that nodes share to the node's own disk
            (`cache`) before they are read, each checked by its hash.
        cache: node-local folder for shards that are staged, or of a remote or compressed corpus.
            `$VARIABLES` are those of each node (`$SLURM_TMPDIR/tiny-onn`); empty takes one in the
            folder for temporary files.
        cache_gb: size limit of that folder, in gigabytes per split; shards that were not used for
            longest make place. 0: no limit.
        patience: seconds for which an object store may fail or be away; after that the run saves
            and stops. Less than launch.step_timeout, or the wait is taken for a hang.
        verify_hashes: read and check every shard when the corpus is opened, not each when it is
            first read.
        build: how to build the corpus if it is not there.
    """

    path: str = "corpus"
    seq_len: int = 512
    train_split: str = "train"
    validation_split: str = "validation"
    shuffle: bool = True
    shuffle_seed: int = 0
    canonical_nodes: int = 0
    stage: bool = False
    cache: str = ""
    cache_gb: float = 0.0
    patience: float = 180.0
    verify_hashes: bool = False
    build: BuildConfig | None = None

    def __post_init__(self) -> None:
        """Refuse values that cannot work, by name."""
        if self.seq_len < 2:
            raise ValueError(
                f"data.seq_len must be at least 2, got {self.seq_len}: a single token predicts "
                "nothing"
            )
        for key in ("cache_gb", "patience"):
            if getattr(self, key) < 0:
                raise ValueError(f"data.{key} must not be negative, got {getattr(self, key)}")
        if self.shuffle_seed < 0 or self.canonical_nodes < 0:
            raise ValueError(
                "data.shuffle_seed and data.canonical_nodes must not be negative, got "
                f"{self.shuffle_seed} and {self.canonical_nodes}"
            )
