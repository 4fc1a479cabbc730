"""Batches of packed documents in an order that depends on the seed only, and can be gone on from.

One *step* is `accumulation` micro-batches per rank of `micro_batch` samples each, G samples over
all ranks. The samples of an epoch are shuffled as one list; step k takes its samples k·G … (k+1)·G,
whatever the number of ranks, nodes and micro-batches: those only decide who gets which of them.
The remainder of an epoch that does not fill a step is left out (another one every epoch, because
every epoch has its own order). Epochs follow each other without end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from data.config import DataConfig
from data.host import together
from data.index import DataError
from data.packing import Batch, padding_sample, to_batch
from data.samples import Site
from data.stored import StoredCorpus, open_corpus
from data.streaming_shim import StreamingDataLoader

__all__ = ["Batch", "DataConfig", "PackedLoader", "open_corpus"]

LARGE_SAMPLES = 1 << 18
"""From here on the order is woven from 64 parts by default (see DataConfig.canonical_nodes)."""


class PackedLoader:
    """One rank's batches of a corpus. Creating one is a collective call.

    Attributes:
        corpus: the corpus, opened and checked.
        tokenizer: its tokenizer.
        seq_len: S, tokens per sample.
        samples_per_step: G, samples that all ranks take in one step.
        samples_per_epoch: samples that an epoch can hand out, before rounding down to steps.
    """

    def __init__(
        self,
        config: DataConfig,
        split: str | None = None,
        *,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world: int,
        part: int = 0,
        parts: int = 1,
    ) -> None:
        """Open the corpus; on several ranks torch.distributed must be initialised.

        Args:
            config: which corpus, in which order.
            split: split to train on; None takes `config.train_split`.
            micro_batch: samples per micro-batch.
            accumulation: micro-batches per rank and step.
            rank: this rank among those that get different data. Where neighbouring ranks share
                data, the number of their group.
            world: number of ranks (or groups) that get different data.
            part: which part of its group's tokens this rank gets.
            parts: ranks in a group.

        Raises:
            DataError: no usable corpus, or too few samples for one step.
        """
        if micro_batch < 1 or accumulation < 1:
            raise ValueError(
                f"micro_batch and accumulation must be positive, got {micro_batch}, {accumulation}"
            )
        self.config = config
        self.split = split or config.train_split
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.rank, self.world = rank, world
        self.part, self.parts = part, parts
        self.samples_per_step = micro_batch * accumulation * world
        site = Site(rank, world)
        self.corpus: StoredCorpus = together(self._open)
        self.tokenizer = self.corpus.tokenizer
        self.seq_len = self.corpus.index.seq_len
        self.canonical_nodes = _canonical_nodes(self.corpus, self.split, config)
        self.samples_per_epoch = _usable(self.corpus, self.split, config)
        held_out = [config.validation_split] * (config.validation_split in self.corpus.index.splits)
        opened = site.open(
            self.corpus,
            [self.split, *held_out],
            verify_hashes=config.verify_hashes,
            batch_size=micro_batch,
            predownload=max(8 * micro_batch * accumulation, 256),
            cache_limit=int(config.cache_gb * 1e9) or None if self.corpus.fetched else None,
            shuffle=config.shuffle,
            shuffle_seed=config.shuffle_seed,
            num_canonical_nodes=self.canonical_nodes,
        )
        self._samples = opened[0]
        self._held_out = opened[1] if held_out else None
        self._stream = StreamingDataLoader(
            self._samples,
            batch_size=micro_batch,
            collate_fn=_as_list,
            num_workers=0,
            # Every iterator draws a seed. From torch's own generator that would make a run that was
            # resumed within an epoch, and so has made one iterator more, draw other numbers.
            generator=torch.Generator(),
        )
        self._iterator: Iterator[dict[str, Any]] | None = None
        self._ahead: list[Batch] | None = None
        self._last: list[Batch] = []
        self._unread: DataError | None = None
        self._read_to = self._consumed = (0, 0)
        self._steps = 0
        self._left_out: list[tuple[int, int]] = []

    @property
    def steps_per_epoch(self) -> int:
        """Steps that one epoch makes."""
        return self.samples_per_epoch // self.samples_per_step

    @property
    def data_step(self) -> int:
        """Steps' worth of data before the next step, over all epochs, what is left out included."""
        return self._data_step(self._consumed)

    def data_step_of(self, state: dict[str, Any]) -> int:
        """Return the `data_step` at which a `state_dict()` was taken."""
        return self._data_step((int(state["epoch"]), int(state["sample_in_epoch"])))

    def sample_ids(self, begin: int, end: int) -> list[int]:
        """Return, sorted, the samples of the data steps [begin, end) of all ranks."""
        ids: list[int] = []
        while begin < end:
            epoch, step = divmod(begin, self.steps_per_epoch)
            steps = min(end - begin, self.steps_per_epoch - step)
            batches = steps * self.accumulation
            ids += self._samples.ids_from(epoch, step * self.samples_per_step, batches)
            begin += steps
        return sorted(ids)

    def leave_out(self, windows: Sequence[tuple[int, int]]) -> None:
        """Never hand out the data steps [begin, end) of these windows; on all ranks alike."""
        self._left_out = sorted(windows)
        # What was read ahead may lie in one of them.
        self._ahead = self._iterator = self._unread = None
        self._read_to = self._consumed

    def next_step(self) -> list[Batch]:
        """Return this rank's micro-batches of the next step.

        Raises:
            DataError: a shard could not be fetched or read.
        """
        if self._unread is not None:
            raise self._unread
        batches = self._read_step() if self._ahead is None else self._ahead
        self._ahead, self._last = None, batches
        self._consumed = self._read_to
        self._steps += 1
        return batches

    def peek_step(self) -> list[Batch]:
        """Return this rank's micro-batches of the step after the one handed out last; not taken.

        A step that cannot be read is no error yet, its like is returned: `next_step` raises.
        """
        if self._ahead is None and self._unread is None:
            try:
                self._ahead = self._read_step()
            except DataError as e:
                self._unread = e
        return self._last if self._ahead is None else self._ahead

    def state_dict(self) -> dict[str, Any]:
        """Return where the steps handed out so far end; plain JSON values, alike on all ranks."""
        epoch, sample = self._consumed
        return {**self._order(), "epoch": epoch, "sample_in_epoch": sample, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly after the steps of a `state_dict()`; on all ranks, any number of them.

        Raises:
            DataError: the state belongs to another corpus or another order.
        """
        for key, mine in self._order().items():
            if state.get(key) != mine:
                raise DataError(
                    f"the checkpoint's data cursor has {key} {state.get(key)}, this run has "
                    f"{mine}: go on with the corpus at {self.config.path} and the data settings "
                    f"that the run was started with, or start a new run"
                )
        self._consumed = self._read_to = (int(state["epoch"]), int(state["sample_in_epoch"]))
        self._steps = int(state["steps"])
        self._ahead = self._iterator = self._unread = None

    def evaluation_batches(
        self, sequences: int = 0, micro_batch: int | None = None
    ) -> Iterator[Batch]:
        """Yield this rank's batches of the validation split: always the same, in the same order.

        Every sample comes exactly once over all ranks. All ranks get the same number of batches;
        where samples run out, padding takes their place (sample id -1, no label, n_labels 0).

        Args:
            sequences: take only the first so many samples, over all ranks; 0 takes all.
            micro_batch: samples per batch; None takes that of training.

        Raises:
            DataError: a shard could not be fetched or read.
        """
        if self._held_out is None:
            return
        total = self.corpus.index.splits[self.config.validation_split].samples
        total = min(total, sequences) if sequences else total
        size = micro_batch or self.micro_batch
        padding = padding_sample(self.seq_len, self.tokenizer.pad_id)
        for first in range(0, total, size * self.world):
            at = [first + i * self.world + self.rank for i in range(size)]
            try:
                samples = [self._held_out[i] if i < total else padding for i in at]
            except Exception as e:
                raise self._unreadable(self.config.validation_split, e) from e
            yield to_batch(samples).part(self.part, self.parts)

    def close(self) -> None:
        """End the background threads."""
        self._iterator = self._ahead = None
        self._samples.stop()
        if self._held_out is not None:
            self._held_out.stop()

    def _open(self) -> StoredCorpus:
        corpus = open_corpus(self.config)
        samples = _usable(corpus, self.split, self.config)
        if samples < self.samples_per_step:
            raise DataError(
                f"{self.config.path}: split '{self.split}' has {samples} samples of "
                f"{corpus.index.seq_len} tokens, one step takes {self.samples_per_step} "
                f"({self.micro_batch} x {self.accumulation} on each of {self.world} ranks): use a "
                f"smaller batch, or build a larger corpus"
            )
        return corpus

    def _order(self) -> dict[str, Any]:
        """What decides which samples a position stands for."""
        return {
            "corpus": self.corpus.index.identity,
            "split": self.split,
            "shuffle": self.config.shuffle,
            "shuffle_seed": self.config.shuffle_seed,
            "canonical_nodes": self.canonical_nodes,
        }

    def _read_step(self) -> list[Batch]:
        self._jump()
        epoch, sample = self._read_to
        if sample + self.samples_per_step > self.samples_per_epoch:
            epoch, sample, self._iterator = epoch + 1, 0, None
        if self._iterator is None:
            self._samples.seek(epoch, sample)
            self._iterator = iter(self._stream)
        batches = []
        for _ in range(self.accumulation):
            try:
                batch = to_batch(next(self._iterator)["samples"])
            except StopIteration:
                # Before the epoch's last step this means that a background thread has failed.
                error = self._samples.failure
                raise self._unreadable(self.split, error) from error
            except Exception as e:
                error = self._samples.failure or e
                raise self._unreadable(self.split, error) from error
            batches.append(batch.part(self.part, self.parts))
        self._read_to = (epoch, sample + self.samples_per_step)
        return batches

    def _jump(self) -> None:
        """Put the reading position behind the windows that it lies in."""
        at = here = self._data_step(self._read_to)
        for begin, end in self._left_out:
            if begin <= at < end:
                at = end
        if at != here:
            epoch, step = divmod(at, self.steps_per_epoch)
            self._read_to, self._iterator = (epoch, step * self.samples_per_step), None

    def _data_step(self, position: tuple[int, int]) -> int:
        epoch, sample = position
        return epoch * self.steps_per_epoch + sample // self.samples_per_step

    def _unreadable(self, split: str, cause: BaseException | None) -> DataError:
        """Say which file of a split is at fault, as closely as can be told."""
        if isinstance(cause, DataError):
            return cause
        try:
            self.corpus.check([split])
        except DataError as found:
            return found
        return DataError(
            f"a sample of {self.corpus.shards_at(split)} cannot be read: "
            f"{cause or 'the stream ended early'} (`tiny-onn data inspect {self.config.path} "
            f"--verify` checks every shard)"
        )


def _as_list(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {"samples": samples}


def _canonical_nodes(corpus: StoredCorpus, split: str, config: DataConfig) -> int:
    if config.canonical_nodes:
        return config.canonical_nodes
    return 64 if corpus.index.splits[split].samples >= LARGE_SAMPLES else 1


def _usable(corpus: StoredCorpus, split: str, config: DataConfig) -> int:
    """Samples per epoch; the parts of the order must be equally long, or streaming repeats some."""
    corpus.shards_at(split)
    parts = _canonical_nodes(corpus, split, config)
    return corpus.index.splits[split].samples // parts * parts
