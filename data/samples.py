"""Stored samples through mosaicml-streaming, opened alike on all ranks of all hosts."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.host import environment_rank, gather, local_world, ranks_on_host, together
from data.index import INDEX, check_hash, rebuild_hint
from data.leftovers import Claim, claim, start_lock, tidy_at_exit
from data.patient import PatientDownloader, downloader
from data.stored import StoredCorpus, fetch
from data.streaming_shim import ShardState, StreamingDataset, generate_work

logger = logging.getLogger(__name__)


class Samples(StreamingDataset):
    """The samples of one split.

    Attributes:
        failure: why a background thread ended; the iteration then just stops.
    """

    failure: BaseException | None = None

    def __init__(self, *, patience: float, remedy: str, **options: Any) -> None:
        """See StreamingDataset.

        Args:
            patience: seconds for which an object store may fail or be away.
            remedy: what to do about a damaged shard.
            options: of StreamingDataset.
        """
        super().__init__(**options)
        self._here: set[int] = set()
        self._remedy = remedy
        self._checked: dict[int, tuple[int, int, int]] = {}
        self._asked: dict[int, float] = {}
        (stream,) = self.streams
        self._patient: PatientDownloader = downloader(stream.remote, patience)
        stream._downloader = self._patient  # type: ignore[assignment]

    def on_exception(self, future: Future[None]) -> None:
        """Note why a downloading thread failed and stop the others."""
        error = future.exception()
        if error is not None:
            self.failure = error
            self._end_threads()

    def _prepare_thread(self, it: Any) -> None:
        with _counted(it):
            super()._prepare_thread(it)

    def _ready_thread(self, it: Any) -> None:
        with _counted(it):
            super()._ready_thread(it)

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Bring a shard here; a failure is raised in every process and thread that wants it.

        Streaming itself leaves a shard that failed marked as on its way, and all others waiting.
        The background threads ask for every sample's shard again: without a limit on the cache one
        that is here stays, and needs no lock between processes.
        """
        if shard_id in self._here and not blocking:
            return
        since = self._asked.get(shard_id, time.monotonic())
        if blocking:
            # Whoever was waited for may have failed: asked again, it has the same deadline.
            self._asked[shard_id] = since
        try:
            with self._patient.waiting_since(since):
                super().prepare_shard(shard_id, blocking)
            if self._shard_states[shard_id] == ShardState.LOCAL:
                self._asked.pop(shard_id, None)
            if self._shard_states[shard_id] == ShardState.LOCAL:
                # Here, because a background thread comes by well before the first sample is read.
                self._check(shard_id)
            if self._shard_states[shard_id] == ShardState.LOCAL and self.cache_limit is None:
                self._here.add(shard_id)
        except BaseException as e:
            self.failure = self.failure or e
            if self.streams[0].remote is not None:
                # What was fetched and is not what it should be must not pass for good next time.
                self.shards[shard_id].evict()
            self._shard_states[shard_id] = ShardState.REMOTE
            self._end_threads()
            raise

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """Return a sample of a shard that is what the index says, now."""
        shard_id, _ = self.spanner[sample_id]
        # Not here yet, or evicted: `prepare_shard` will look.
        with suppress(FileNotFoundError):
            self._check(shard_id)
        return super().get_item(sample_id, retry)

    def _check(self, shard_id: int) -> None:
        """Compare a shard's hash, once, and again whenever the file has been touched.

        Raises:
            DataError: it is not what the index says.
        """
        shard = self.shards[shard_id]
        ((info, _),) = shard.file_pairs
        path = Path(shard.dirname, shard.split, info.basename)
        stat = path.stat()
        mark = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        known = self._checked.get(shard_id)
        if known == mark:
            return
        since = "" if known is None else "; it was intact when this run first read it"
        check_hash(path, info.hashes["sha256"], f"{self._remedy}{since}")
        self._checked[shard_id] = mark

    @property
    def prefix(self) -> int:
        """Number under which streaming keeps this data set's shared memory on this host."""
        return int(self._shm_prefix_int)

    def seek(self, epoch: int, sample: int) -> None:
        """Let the next iteration start at a sample of an epoch; on all ranks of a host alike."""
        # Without the first line, streaming takes a position before the current one for outdated.
        self.next_epoch = epoch
        self.load_state_dict(
            {
                "epoch": epoch,
                "sample_in_epoch": sample,
                "num_canonical_nodes": self.num_canonical_nodes,
                "shuffle_seed": self.shuffle_seed,
                # Counting from one node makes the order the same for any number of nodes, also
                # one that does not divide num_canonical_nodes.
                "initial_physical_nodes": 1,
            }
        )

    def ids_from(self, epoch: int, sample: int, batches: int) -> list[int]:
        """Return, sorted, which samples all ranks together take from a position of an epoch on.

        Nothing is read and nothing moves, but it takes as long as the begin of an epoch.

        Args:
            epoch: number of the epoch.
            sample: samples of it that come before.
            batches: batches that every rank takes.
        """
        world = self._parallel_rank_world.detect_workers()
        # By node, rank of the node, worker, batch and place in the batch.
        work = generate_work(self.batching_method, self, world, epoch, sample)
        return sorted(int(i) for i in work[:, :, :, :batches].flatten())

    def stop(self) -> None:
        """End the background threads; nothing can be iterated afterwards."""
        self._end_threads()
        if hasattr(self, "_iterator"):
            self._iterator.non_blocking_exit()
        if hasattr(self, "_executor"):
            self._executor.shutdown(wait=False)

    def _end_threads(self) -> None:
        # There are none before the first iteration.
        if hasattr(self, "_event"):
            self._event.set()


@contextmanager
def _counted(it: Any) -> Iterator[None]:
    """Count a background thread that fails among those that ended.

    Streaming counts only those that end well, and waits for ever for two that failed.
    """
    try:
        yield
    except BaseException:
        it.on_exit()
        raise


class Site:
    """Where this process stands among the ranks and on its host."""

    def __init__(self, rank: int, world: int) -> None:
        """Check the place given against torchrun's environment.

        Args:
            rank: number of this rank (or its group) among those that get different data.
            world: how many get different data.

        Raises:
            ValueError: the two do not fit the environment.
            RuntimeError: several ranks, and torch.distributed is not initialised.
        """
        self.rank, self.world = environment_rank()
        self.replication = self.world // max(world, 1)
        if self.replication * world != self.world or self.rank // self.replication != rank:
            raise ValueError(
                f"data rank {rank} of {world} does not fit rank {self.rank} of {self.world} in the "
                f"environment (RANK, WORLD_SIZE): ranks that share data must be neighbours"
            )
        if self.world > 1 and not dist.is_initialized():
            raise RuntimeError(
                f"WORLD_SIZE is {self.world}, but torch.distributed is not initialised: call "
                f"init_mesh() before the data is opened"
            )

    def open(
        self, corpus: StoredCorpus, splits: list[str], verify_hashes: bool, **options: Any
    ) -> list[Samples]:
        """Open splits; a collective call.

        Args:
            corpus: the corpus.
            splits: names of the splits.
            verify_hashes: read every shard of a local corpus first.
            options: for StreamingDataset.

        Raises:
            DataError: shards are missing or damaged.
        """
        host_ranks = ranks_on_host()
        leader = self.rank - self.rank % host_ranks
        claims: list[Claim] = []
        prefixes = tidy_at_exit()
        with ExitStack() as stack:

            def prepare() -> list[str]:
                if self.rank != leader:
                    return []
                corpus.check(splits, verify_hashes)
                stack.enter_context(start_lock())
                claims.extend(
                    claim(corpus.folder / split, separate=corpus.fetched) for split in splits
                )
                if corpus.fetched:
                    for split, c in zip(splits, claims, strict=True):
                        _prepare_cache(corpus, split, c.folder)
                return [str(c.folder) for c in claims]

            folders = gather(together(prepare))[leader]
            with local_world(host_ranks):
                opened = [
                    Samples(
                        local=folder,
                        remote=corpus.shards_at(split) if corpus.fetched else None,
                        validate_hash="sha256" if corpus.fetched else None,
                        download_retry=1,
                        patience=corpus.patience,
                        remedy=rebuild_hint(corpus.index, corpus.path),
                        replication=self.replication if self.replication > 1 else None,
                        **options,
                    )
                    for split, folder in zip(splits, folders, strict=True)
                ]
            prefixes += [samples.prefix for samples in opened]
            for c, samples in zip(claims, opened, strict=False):
                c.record(samples.prefix)
        return opened


def _prepare_cache(corpus: StoredCorpus, split: str, folder: Path) -> None:
    """Make a cache folder hold the split's own index and no shard of another size."""
    path = folder / INDEX
    expected = corpus.index.splits[split].index_sha256
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        fetch(f"{corpus.shards_at(split)}/{INDEX}", path, expected, corpus.patience)
    for shard in json.loads(path.read_bytes())["shards"]:
        for info in filter(None, (shard["raw_data"], shard["zip_data"])):
            cached = folder / info["basename"]
            if cached.exists() and cached.stat().st_size != info["bytes"]:
                logger.warning(
                    "%s has %d of %d bytes: fetching it again",
                    cached,
                    cached.stat().st_size,
                    info["bytes"],
                )
                cached.unlink()
