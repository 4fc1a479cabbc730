"""Processes that the tests of this room share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ranks import Ranks

# Ops that DeepSpeed compiles on first use stay with the checkout.
CACHE = Path(__file__).parents[2] / ".cache" / "torch_extensions"


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(CACHE))
    config.addinivalue_line("markers", "nvme: swaps to disk; needs DeepSpeed's async_io op")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Ranks]:
    with Ranks(1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks
