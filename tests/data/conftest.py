"""A tiny corpus of a few standard library modules, built once for all tests of this room."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from data.build import build
from data.config import BuildConfig, DataConfig
from data.leftovers import sweep
from data.loader import PackedLoader

# How long an example takes says something of the machine only.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

MODULES = """
    abc bisect calendar colorsys contextlib copy csv dataclasses fnmatch fractions functools getopt
    glob graphlib hashlib heapq html/parser json/decoder keyword linecache lzma numbers operator
    queue quopri random sched shlex shutil stat statistics string tempfile textwrap timeit token
    types uuid wave weakref
"""
SEQ_LEN = 64
VOCAB = 600


@pytest.fixture(scope="session", autouse=True)
def _clean_shared_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove what killed processes of these tests left, and nothing of other tests."""
    yield
    sweep(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of source files."""
    folder = tmp_path_factory.mktemp("texts")
    library = Path(sysconfig.get_path("stdlib"))
    for module in MODULES.split():
        target = folder / f"{module}.py"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(library / f"{module}.py", target)
    return folder


def recipe(texts: Path, **changes: object) -> BuildConfig:
    """How the tests build a corpus."""
    settings: dict[str, object] = {
        "input": [str(texts)],
        "vocab_size": VOCAB,
        "validation_fraction": 0.2,
        "shard_mb": 1,
        "workers": 2,
    }
    return BuildConfig(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def corpus(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built corpus; tests that damage one work on a copy."""
    out = tmp_path_factory.mktemp("corpora") / "tiny"
    build(recipe(texts), out, SEQ_LEN)
    return out


@pytest.fixture
def copied(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus that a test may damage."""
    return Path(shutil.copytree(corpus, tmp_path / "tiny"))


def data_config(path: Path | str, **changes: object) -> DataConfig:
    """How the tests read a corpus."""
    return DataConfig(**{"path": str(path), "seq_len": SEQ_LEN, **changes})  # type: ignore[arg-type]


class Loaders:
    """Opens loaders of one rank and closes them when the test ends."""

    def __init__(self) -> None:
        self._open: list[PackedLoader] = []

    def __call__(
        self,
        path: Path | str,
        split: str | None = None,
        micro_batch: int = 4,
        accumulation: int = 10,
        **changes: object,
    ) -> PackedLoader:
        loader = PackedLoader(
            data_config(path, **changes),
            split,
            micro_batch=micro_batch,
            accumulation=accumulation,
            rank=0,
            world=1,
        )
        self._open.append(loader)
        return loader

    def close(self) -> None:
        for loader in self._open:
            loader.close()


@pytest.fixture
def open_loader() -> Iterator[Loaders]:
    loaders = Loaders()
    yield loaders
    loaders.close()
