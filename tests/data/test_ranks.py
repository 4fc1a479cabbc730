"""However many ranks share a step, together they take the same samples."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from data.index import read_index
from data.loader import PackedLoader
from parallel.mesh import Mesh
from tests.data.conftest import Loaders, data_config
from tests.ranks import RankError, Ranks

GLOBAL_BATCH = 48
"""Samples of a step over all ranks."""

STEPS = 4


def sample_ids(step: list[Any]) -> list[int]:
    return [i for b in step for i in b.sample_ids]


def open_on(mesh: Mesh, path: str, micro_batch: int, groups: int, **changes: Any) -> PackedLoader:
    """Open on one of `mesh.world / groups` data ranks; neighbours share data."""
    world = mesh.world // groups
    return PackedLoader(
        data_config(path, **changes),
        micro_batch=micro_batch,
        accumulation=GLOBAL_BATCH // micro_batch // world,
        rank=mesh.rank // groups,
        world=world,
    )


def train(
    mesh: Mesh,
    path: str,
    micro_batch: int,
    groups: int = 1,
    state: dict[str, Any] | None = None,
    agents: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """A few steps across the end of an epoch, and two evaluations; what this rank saw."""
    local = os.environ["LOCAL_WORLD_SIZE"]
    if agents:
        os.environ["LOCAL_WORLD_SIZE"] = "1"
    try:
        loader = open_on(mesh, path, micro_batch, groups, **changes)
        assert os.environ["LOCAL_WORLD_SIZE"] == ("1" if agents else local)
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = local
    if state is None:
        start = {**loader.state_dict(), "sample_in_epoch": (loader.steps_per_epoch - 2) * 48}
    else:
        start = state
    loader.load_state_dict(start)
    states, steps, peeked = [], [], []
    for _ in range(STEPS):
        states.append(loader.state_dict())
        peeked.append([b.ids_T.tolist() for b in loader.peek_step()])
        steps.append(loader.next_step())
    assert peeked == [[b.ids_T.tolist() for b in s] for s in steps]
    evaluations = [[b.sample_ids for b in loader.evaluation_batches()] for _ in range(2)]
    assert evaluations[0] == evaluations[1]
    loader.close()
    return {
        "states": states,
        "steps": [sample_ids(s) for s in steps],
        "evaluation": evaluations[0],
    }


def together(results: list[dict[str, Any]]) -> list[list[int]]:
    """The samples of each step over all ranks."""
    assert all(r["states"] == results[0]["states"] for r in results)
    return [sorted(i for r in results for i in r["steps"][n]) for n in range(STEPS)]


@pytest.fixture(scope="module")
def expected(corpus: Path) -> dict[str, Any]:
    """What one rank takes."""
    loaders = Loaders()
    loader = loaders(corpus, micro_batch=8, accumulation=6)
    loader.load_state_dict(
        {**loader.state_dict(), "sample_in_epoch": (loader.steps_per_epoch - 2) * 48}
    )
    states, steps = [], []
    for _ in range(STEPS):
        states.append(loader.state_dict())
        steps.append(sorted(sample_ids(loader.next_step())))
    loaders.close()
    return {"states": states, "steps": steps}


def check_evaluation(results: list[dict[str, Any]], corpus: Path) -> None:
    batches = [r["evaluation"] for r in results]
    assert len({len(b) for b in batches}) == 1, "every rank must have as many batches"
    taken = [i for b in batches for row in b for i in row if i >= 0]
    assert sorted(taken) == list(range(read_index(corpus).splits["validation"].samples))


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def test_two_ranks_take_the_samples_that_one_takes(
    corpus: Path, expected: dict[str, Any], two_ranks: Ranks
) -> None:
    results = two_ranks.run(train, str(corpus), 4)
    assert together(results) == expected["steps"]
    assert results[0]["states"] == expected["states"]
    check_evaluation(results, corpus)


def test_two_ranks_go_on_from_the_state_of_one(
    corpus: Path, expected: dict[str, Any], two_ranks: Ranks
) -> None:
    resumed = two_ranks.run(train, str(corpus), 8, 1, expected["states"][1])
    assert together(resumed)[: STEPS - 1] == expected["steps"][1:]


def test_two_agents_on_one_machine_take_the_same_samples(
    corpus: Path, expected: dict[str, Any], two_ranks: Ranks
) -> None:
    """LOCAL_WORLD_SIZE is 1 then, but /dev/shm is shared."""
    assert together(two_ranks.run(train, str(corpus), 4, 1, None, True)) == expected["steps"]


def test_ranks_of_a_group_get_the_same_samples(
    corpus: Path, expected: dict[str, Any], two_ranks: Ranks
) -> None:
    shared = two_ranks.run(train, str(corpus), 8, 2)
    assert shared[0] == shared[1]
    assert together(shared[:1]) == expected["steps"]


def test_four_ranks_take_the_samples_that_one_takes(corpus: Path, expected: dict[str, Any]) -> None:
    with Ranks(4) as ranks:
        results = ranks.run(train, str(corpus), 3)
        assert together(results) == expected["steps"]
        assert results[0]["states"] == expected["states"]
        check_evaluation(results, corpus)
        shared = ranks.run(train, str(corpus), 4, 2)
        assert shared[0] == shared[1] and shared[2] == shared[3]
        assert together([shared[0], shared[2]]) == expected["steps"]
        check_evaluation([shared[0], shared[2]], corpus)


def open_with_a_short_shard(mesh: Mesh, path: str) -> str:
    try:
        open_on(mesh, path, 1, 1)
    except ValueError as e:
        return str(e)
    return "opened"


def test_a_bad_shard_is_reported_by_every_rank_and_none_hangs(
    copied: Path, two_ranks: Ranks
) -> None:
    shard = copied / "train" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:-7])
    messages = two_ranks.run(open_with_a_short_shard, str(copied))
    for message in messages:
        assert re.search(r"train/shard\.00000\.mds is cut short", message)


def lose_a_shard(mesh: Mesh, path: str) -> str:
    loader = open_on(mesh, path, 1, 1)
    loader.next_step()
    dist.barrier()
    if mesh.rank == 1:
        for shard in (Path(path) / "train").glob("*.mds"):
            shard.unlink()
    try:
        for _ in range(loader.steps_per_epoch):
            loader.next_step()
    except ValueError as e:
        loader.close()
        return str(e)
    return "nothing noticed"


def test_a_shard_that_vanishes_is_reported_by_every_rank_and_none_hangs(
    copied: Path, two_ranks: Ranks
) -> None:
    messages = two_ranks.run(lose_a_shard, str(copied))
    for message in messages:
        assert re.search(r"train/shard\.\d+\.mds is missing", message)


def raise_alone(mesh: Mesh) -> None:
    from data.host import together as on_all

    def work() -> None:
        if mesh.rank == 1:
            raise ValueError("no space left")

    on_all(work)


def test_what_fails_on_one_rank_fails_on_all(two_ranks: Ranks) -> None:
    with pytest.raises(RankError, match="rank 1: no space left"):
        two_ranks.run(raise_alone)
