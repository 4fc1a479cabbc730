"""The stream of batches is fixed by the seed, goes on from anywhere, and refuses bad data."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.index import DataError, read_index
from data.loader import PackedLoader
from data.packing import IGNORED, Batch
from data.stored import open_corpus
from data.streaming_shim import StreamingDataset
from tests.data.conftest import SEQ_LEN, Loaders, data_config


def ids(step: list[Batch]) -> list[list[int]]:
    return [b.ids_T.tolist() for b in step]


def sample_ids(step: list[Batch]) -> list[int]:
    return [i for b in step for i in b.sample_ids]


def test_a_step_is_accumulation_micro_batches_of_packed_samples(
    corpus: Path, open_loader: Loaders
) -> None:
    loader = open_loader(corpus)
    step = loader.next_step()
    assert len(step) == 10
    for batch in step:
        assert batch.ids_T.shape == batch.labels_T.shape == (4 * SEQ_LEN,)
        assert sum(batch.lengths) == 4 * SEQ_LEN and len(batch.sample_ids) == 4
        assert batch.n_labels == int((batch.labels_T != IGNORED).sum()) > 0


def test_the_text_of_a_sample_is_what_was_stored(corpus: Path, open_loader: Loaders) -> None:
    loader = open_loader(corpus)
    batch = loader.next_step()[0]
    stored = loader._samples[batch.sample_ids[1]]
    assert batch.ids_T[SEQ_LEN : 2 * SEQ_LEN].tolist() == stored["tokens"][:-1].tolist()


def test_peeking_shows_the_next_step_and_takes_nothing(corpus: Path, open_loader: Loaders) -> None:
    loader, other = open_loader(corpus), open_loader(corpus)
    for _ in range(5):
        before = loader.state_dict()
        peeked = ids(loader.peek_step())
        assert ids(loader.peek_step()) == peeked
        assert loader.state_dict() == before
        step = loader.next_step()
        assert ids(step) == peeked
        assert ids(step) == ids(other.next_step())


def test_an_epoch_takes_every_sample_at_most_once_and_the_next_has_another_order(
    corpus: Path, open_loader: Loaders
) -> None:
    loader = open_loader(corpus)
    steps = loader.steps_per_epoch
    epochs = [[i for _ in range(steps) for i in sample_ids(loader.next_step())] for _ in range(3)]
    samples = read_index(corpus).splits["train"].samples
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == samples // 40 * 40
        assert set(epoch) <= set(range(samples))
        assert np.abs(np.diff(epoch)).mean() > samples / 10, "an epoch must be shuffled"
    assert epochs[0] != epochs[1] != epochs[2]


def test_without_shuffling_samples_come_in_order(corpus: Path, open_loader: Loaders) -> None:
    loader = open_loader(corpus, shuffle=False)
    taken = [i for _ in range(loader.steps_per_epoch) for i in sample_ids(loader.next_step())]
    assert taken == list(range(len(taken)))
    assert sample_ids(loader.next_step()) == list(range(40))


def test_the_seed_decides_the_order(corpus: Path, open_loader: Loaders) -> None:
    one, same, other = (open_loader(corpus, shuffle_seed=s) for s in (1, 1, 2))
    first = ids(one.next_step())
    assert first == ids(same.next_step()) != ids(other.next_step())


@pytest.mark.parametrize("canonical_nodes", [0, 8])
def test_a_loaded_state_goes_on_with_exactly_the_next_step(
    corpus: Path, open_loader: Loaders, canonical_nodes: int
) -> None:
    loader = open_loader(corpus, canonical_nodes=canonical_nodes)
    per_epoch = loader.steps_per_epoch
    states: list[str] = []
    steps: list[list[list[int]]] = []
    for n in range(2 * per_epoch + 3):
        if n % 2:
            loader.peek_step()
        states.append(json.dumps(loader.state_dict()))
        steps.append(ids(loader.next_step()))
    marks = (0, 1, per_epoch // 2, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch)
    for at in marks:
        resumed = open_loader(corpus, canonical_nodes=canonical_nodes)
        resumed.load_state_dict(json.loads(states[at]))
        assert resumed.state_dict() == json.loads(states[at])
        for n in range(at, min(at + 3, len(steps))):
            assert ids(resumed.next_step()) == steps[n], (at, n)


def test_a_running_loader_can_be_set_back_and_forward(corpus: Path, open_loader: Loaders) -> None:
    loader = open_loader(corpus)
    per_epoch = loader.steps_per_epoch
    states, steps = [], []
    for _ in range(per_epoch + 5):
        states.append(loader.state_dict())
        steps.append(ids(loader.next_step()))
    for at in (per_epoch + 2, 1, per_epoch - 1, 0):
        loader.load_state_dict(states[at])
        assert [ids(loader.next_step()) for _ in range(3)] == steps[at : at + 3]


def test_data_that_is_left_out_is_never_handed_out_wherever_it_is_gone_on_from(
    corpus: Path, open_loader: Loaders
) -> None:
    loader = open_loader(corpus)
    per_epoch = loader.steps_per_epoch
    count = per_epoch + 6
    steps, states = [], [loader.state_dict()]
    for _ in range(count):
        steps.append(ids(loader.next_step()))
        states.append(loader.state_dict())
    assert [loader.data_step_of(state) for state in states] == list(range(count + 1))
    # Two that touch, one across the end of the epoch, one at the very start.
    windows = [(2, 3), (3, 5), (per_epoch - 1, per_epoch + 2), (0, 1)]
    kept = [k for k in range(count) if not any(a <= k < b for a, b in windows)]
    for at in (0, 1, 3, 4, per_epoch):
        resumed = open_loader(corpus)
        resumed.load_state_dict(states[at])
        resumed.peek_step()
        resumed.leave_out(windows)
        for k in (k for k in kept if k >= at):
            assert ids(resumed.next_step()) == steps[k], (at, k)
            assert resumed.data_step == k + 1


def test_the_samples_of_any_steps_can_be_told(corpus: Path, open_loader: Loaders) -> None:
    loader = open_loader(corpus)
    per_epoch = loader.steps_per_epoch
    steps = [sample_ids(loader.next_step()) for _ in range(per_epoch + 3)]
    state = loader.state_dict()
    for begin, end in ((0, 1), (2, 5), (per_epoch - 2, per_epoch + 2), (3, 3)):
        expected = [i for step in steps[begin:end] for i in step]
        assert loader.sample_ids(begin, end) == sorted(expected)
    assert loader.state_dict() == state
    assert loader.next_step()[0].sample_ids == open_at(open_loader(corpus), state)


def open_at(loader: PackedLoader, state: dict[str, Any]) -> list[int]:
    """The samples of the first micro-batch behind a state."""
    loader.load_state_dict(state)
    return loader.next_step()[0].sample_ids


def test_the_batch_may_change_in_the_middle_of_an_epoch(corpus: Path, open_loader: Loaders) -> None:
    small, large = open_loader(corpus), open_loader(corpus, accumulation=20)
    taken = [sample_ids(small.next_step()) for _ in range(5)]
    large.load_state_dict(small.state_dict())
    # Within a step the order of samples over micro-batches is not promised, nor needed.
    expected = sample_ids(small.next_step()) + sample_ids(small.next_step())
    assert sorted(sample_ids(large.next_step())) == sorted(expected)
    assert len(taken) == 5


@pytest.mark.parametrize("change", [{"shuffle_seed": 7}, {"shuffle": False}])
def test_a_state_of_another_order_is_refused(
    corpus: Path, open_loader: Loaders, change: dict[str, Any]
) -> None:
    state = open_loader(corpus).state_dict()
    key, value = next(iter(change.items()))
    with pytest.raises(DataError, match=f"data cursor has {key} .*this run has {value}"):
        open_loader(corpus, **change).load_state_dict(state)


def test_a_state_of_another_corpus_is_refused(corpus: Path, open_loader: Loaders) -> None:
    state = {**open_loader(corpus).state_dict(), "corpus": "0123"}
    with pytest.raises(DataError, match="data cursor has corpus 0123"):
        open_loader(corpus).load_state_dict(state)


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 6, 16])
@pytest.mark.parametrize("canonical_nodes", [1, 8])
def test_the_order_is_the_same_for_any_number_of_nodes_and_ranks(
    corpus: Path, open_loader: Loaders, nodes: int, canonical_nodes: int
) -> None:
    from streaming.base.batching import generate_work
    from streaming.base.world import World

    step = 1200
    loader = open_loader(corpus, micro_batch=step, accumulation=1, canonical_nodes=canonical_nodes)
    expected = [set(sample_ids(loader.next_step())) for _ in range(loader.steps_per_epoch)]
    assert len(expected) >= 3
    for ranks_per_node, done in ((1, 0), (5, 0), (5, 1)):
        samples = loader._samples
        samples.initial_physical_nodes = 1
        samples.batch_size = step // (nodes * ranks_per_node)
        world = World(nodes, ranks_per_node, 1, 0)
        work = generate_work("random", samples, world, 0, done * step)
        # (nodes, ranks, workers, batches, batch) → the samples of each batch over all ranks.
        for n, wanted in enumerate(expected[done:]):
            assert set(work[:, :, 0, n].ravel().tolist()) == wanted


def test_evaluation_takes_every_sample_once_in_the_same_order_every_time(
    corpus: Path, open_loader: Loaders
) -> None:
    loader = open_loader(corpus, micro_batch=3)
    expected = read_index(corpus).splits["validation"]
    first = list(loader.evaluation_batches())
    loader.next_step()
    again = list(loader.evaluation_batches())
    assert [b.ids_T.tolist() for b in first] == [b.ids_T.tolist() for b in again]
    taken = sample_ids(first)
    assert [i for i in taken if i >= 0] == list(range(expected.samples))
    assert all(len(b.sample_ids) == 3 for b in first)
    assert sum(b.n_labels for b in first) == expected.tokens - expected.documents
    labels = np.concatenate([b.labels_T[b.labels_T >= 0].numpy() for b in first])
    assert int(loader.tokenizer.token_bytes[labels].sum()) == expected.bytes
    some = list(loader.evaluation_batches(5, micro_batch=2))
    assert sample_ids(some) == [0, 1, 2, 3, 4, -1]
    assert some[2].labels_T[SEQ_LEN:].tolist() == [IGNORED] * SEQ_LEN


def test_a_corpus_without_the_validation_split_evaluates_nothing(
    corpus: Path, open_loader: Loaders
) -> None:
    loader = open_loader(corpus, validation_split="test")
    assert list(loader.evaluation_batches()) == []
    with pytest.raises(DataError, match="no split 'test', only train, validation"):
        open_loader(corpus, "test")


def test_no_corpus_is_refused_with_the_command_that_builds_one(
    tmp_path: Path, open_loader: Loaders
) -> None:
    with pytest.raises(DataError, match=r"index\.json does not exist.*(.|\n)*tiny-onn data build"):
        open_loader(tmp_path / "nothing")


def test_another_seq_len_is_refused_with_the_command_that_builds_it(
    corpus: Path, open_loader: Loaders
) -> None:
    reason = rf"packed for seq_len {SEQ_LEN}, the configuration says 128(.|\n)*--seq_len 128"
    with pytest.raises(DataError, match=reason):
        open_loader(corpus, seq_len=128)


def test_another_tokenizer_is_refused(copied: Path, texts: Path, open_loader: Loaders) -> None:
    from data.tokenizer import Tokenizer

    other = Tokenizer.train([p.read_text() for p in texts.rglob("*.py")], 700)
    other.save(copied / "tokenizer.model")
    with pytest.raises(DataError, match=r"tokenizer\.model is not the tokenizer .* \(700 ids\)"):
        open_loader(copied)
    (copied / "tokenizer.model").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.model is missing"):
        open_loader(copied)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_missing_or_short_shard_is_refused_by_name(
    copied: Path, open_loader: Loaders, split: str
) -> None:
    shard = copied / split / read_index(copied).splits[split].shards[0].file
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"{split}/{shard.name} is cut short: .*(.|\n)*data build"):
        open_loader(copied)
    shard.unlink()
    with pytest.raises(DataError, match=f"{split}/{shard.name} is missing"):
        open_loader(copied)


def test_a_changed_shard_is_refused_when_hashes_are_verified(
    copied: Path, open_loader: Loaders
) -> None:
    shard = copied / "train" / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    open_loader(copied)
    with pytest.raises(DataError, match=f"{shard.name} is damaged: SHA-256"):
        open_loader(copied, verify_hashes=True)


def test_shards_of_another_build_are_refused(copied: Path, open_loader: Loaders) -> None:
    index = copied / "train" / "index.json"
    index.write_text(index.read_text().replace("1048576", "1048577"))
    with pytest.raises(DataError, match=r"train/index\.json.*from different builds"):
        open_loader(copied)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not the index of a corpus"),
        ("[]", "is not the index of a corpus"),
        ('{"schema": 99}', "has schema 99, this version reads 1"),
        ('{"schema": 1, "splits": {}}', "is damaged"),
    ],
)
def test_a_damaged_index_is_refused(copied: Path, content: str, reason: str) -> None:
    (copied / "index.json").write_text(content)
    with pytest.raises(DataError, match=reason):
        open_corpus(data_config(copied))


def test_a_shard_that_vanishes_during_training_is_named(copied: Path, open_loader: Loaders) -> None:
    loader = open_loader(copied)
    loader.next_step()
    for shard in (copied / "train").glob("*.mds"):
        shard.unlink()
    with pytest.raises(DataError, match=r"train/shard\.\d+\.mds is missing"):
        for _ in range(loader.steps_per_epoch):
            loader.next_step()


def test_a_batch_larger_than_the_corpus_is_refused(corpus: Path, open_loader: Loaders) -> None:
    with pytest.raises(DataError, match=r"one step takes 3000000 \(1000 x 3000 on each of 1 ranks"):
        open_loader(corpus, micro_batch=1000, accumulation=3000)


def test_a_place_that_contradicts_the_environment_is_refused(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(rank: int, world: int) -> PackedLoader:
        return PackedLoader(
            data_config(corpus), micro_batch=1, accumulation=1, rank=rank, world=world
        )

    with pytest.raises(ValueError, match="data rank 0 of 2 does not fit rank 0 of 1"):
        opened(0, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="WORLD_SIZE is 2, but torch"):
        opened(0, 2)


def test_a_moved_corpus_is_the_same_corpus(
    corpus: Path, tmp_path: Path, open_loader: Loaders
) -> None:
    moved = Path(shutil.copytree(corpus, tmp_path / "elsewhere" / "renamed"))
    loader = open_loader(corpus)
    loader.next_step()
    other = open_loader(moved)
    other.load_state_dict(loader.state_dict())
    assert ids(other.next_step()) == ids(loader.next_step())
    assert re.fullmatch("[0-9a-f]{64}", other.corpus.index.identity)


def flip(shard: Path) -> None:
    """Turn a bit around in the middle of a file."""
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))


def test_a_flipped_bit_is_found_before_a_sample_of_the_shard_is_used(
    copied: Path, open_loader: Loaders
) -> None:
    loader = open_loader(copied)
    for shard in (copied / "train").glob("*.mds"):
        flip(shard)
    with pytest.raises(DataError, match=r"(?s)shard\.\d+\.mds is damaged: SHA-256 .*data build"):
        loader.next_step()


@pytest.mark.timeout(300)
def test_two_background_threads_that_fail_end_the_stream(
    corpus: Path, open_loader: Loaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("the cable is out")

    loader = open_loader(corpus)
    for thread in ("_prepare_thread", "_ready_thread"):
        monkeypatch.setattr(StreamingDataset, thread, fails)
    with pytest.raises(DataError, match="the cable is out"):
        loader.next_step()


def test_a_shard_that_changes_under_a_running_run_stops_it(
    copied: Path, open_loader: Loaders
) -> None:
    loader = open_loader(copied)
    state = loader.state_dict()
    expected = ids(loader.next_step())
    for shard in (copied / "train").glob("*.mds"):
        # Touched, and the same: no harm done.
        shard.write_bytes(shard.read_bytes())
    cursor = loader.state_dict()
    ids(loader.next_step())
    for shard in (copied / "train").glob("*.mds"):
        flip(shard)
    assert loader.peek_step() is not None
    with pytest.raises(DataError, match="it was intact when this run first read it"):
        loader.next_step()
    assert loader.state_dict()["steps"] == cursor["steps"] + 1
    for shard in (copied / "train").glob("*.mds"):
        flip(shard)
    again = open_loader(copied)
    again.load_state_dict(state)
    assert ids(again.next_step()) == expected


def test_staged_shards_are_copied_to_the_nodes_disk_and_checked(
    corpus: Path, tmp_path: Path, open_loader: Loaders, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shutil.copytree(corpus, shared)
    monkeypatch.setenv("NODE_DISK", str(tmp_path / "disk"))
    local, staged = open_loader(corpus), open_loader(shared, stage=True, cache="$NODE_DISK/cache")
    for _ in range(3):
        assert ids(staged.next_step()) == ids(local.next_step())
    assert list((tmp_path / "disk" / "cache").glob("*/train/run0/*.mds"))
    for shard in (shared / "train").glob("*.mds"):
        flip(shard)
    bad = open_loader(shared, stage=True, cache=str(tmp_path / "other"))
    with pytest.raises(DataError, match=r"Checksum failure: .*shard\.\d+\.mds"):
        bad.next_step()
    with pytest.raises(ValueError, match="does not have that environment variable"):
        open_loader(shared, stage=True, cache="$NO_SUCH_DISK/cache")
