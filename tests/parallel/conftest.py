"""Processes that the tests of this room share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ranks import Ranks


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "nvme: swaps to disk; needs DeepSpeed's async_io op")


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Ranks]:
    with Ranks(1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks
