"""Saving a run asks for all the host memory that its copies take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from launcher import resume


class AskedError(Exception):
    """Carries what a save asked for, before anything is copied."""


def test_copies_of_tables_on_the_device_count_before_any_is_made() -> None:
    def host_buffers(needed: int) -> None:
        raise AskedError(needed)

    def snapshot(_: object) -> Tensor:
        raise AssertionError("copied before there was room")

    store = SimpleNamespace(wait=lambda _: None, host_buffers=host_buffers)
    components: Any = SimpleNamespace(
        store=store,
        step=4,
        engine=SimpleNamespace(snapshot_bytes=1000, snapshot=snapshot),
        tables={"a": SimpleNamespace(snapshot_bytes=30), "b": SimpleNamespace(snapshot_bytes=4)},
    )
    with pytest.raises(AskedError, match=r"^1034$"):
        resume.save(components)
