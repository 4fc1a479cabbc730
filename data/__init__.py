"""Corpora: documents to tokenizer and packed shards, and shards to training batches.

Names are loaded when first used: the tokenizer's worker processes need neither torch nor streaming.
`data.build` is a module, its function is `data.build.build`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data.config import BuildConfig, DataConfig
    from data.corpus import Corpus, Document
    from data.index import DataError, Index
    from data.leftovers import left_behind
    from data.loader import PackedLoader
    from data.packing import IGNORED, Batch
    from data.report import inspect, table, verify
    from data.stored import StoredCorpus, is_remote, open_corpus, open_path
    from data.tokenizer import Tokenizer

_HOME = {
    "Batch": "data.packing",
    "BuildConfig": "data.config",
    "Corpus": "data.corpus",
    "DataConfig": "data.config",
    "DataError": "data.index",
    "Document": "data.corpus",
    "IGNORED": "data.packing",
    "Index": "data.index",
    "PackedLoader": "data.loader",
    "StoredCorpus": "data.stored",
    "Tokenizer": "data.tokenizer",
    "inspect": "data.report",
    "is_remote": "data.stored",
    "left_behind": "data.leftovers",
    "open_corpus": "data.stored",
    "open_path": "data.stored",
    "table": "data.report",
    "verify": "data.report",
}

__all__ = [
    "IGNORED",
    "Batch",
    "BuildConfig",
    "Corpus",
    "DataConfig",
    "DataError",
    "Document",
    "Index",
    "PackedLoader",
    "StoredCorpus",
    "Tokenizer",
    "inspect",
    "is_remote",
    "left_behind",
    "open_corpus",
    "open_path",
    "table",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that it lives in."""
    if name not in _HOME:
        raise AttributeError(f"module 'data' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
