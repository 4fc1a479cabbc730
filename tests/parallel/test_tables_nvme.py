"""The nvme tier: the same bits as memory, whatever the cache, and never garbage from a disk."""

import errno
import fcntl
import mmap
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.rows_step import TorchRows
from parallel import table_nvme
from parallel.table_cache import SlotCache
from parallel.table_layout import RowLayout, TableConfig, TableError
from parallel.table_nvme import SECTOR, NvmeTier, RecordFile, record_bytes
from tests.parallel.table_runs import SINGLE, Run, make_table, run_all, train, train_one


def on_disk(path, **changes) -> TableConfig:
    return TableConfig(tier="nvme", nvme_path=str(path), **{"io_threads": 4, **changes})


@pytest.mark.parametrize("cached", [1, 7, 30, 0, 1000])
@pytest.mark.parametrize("optimizer", ["adam", "adam_rowwise", "adagrad_rowwise"])
def test_any_cache_gives_the_bits_of_host_memory(tmp_path, cached, optimizer):
    host = Run(TableConfig(optimizer=optimizer), steps=6, accumulation=2, prefetch="within")
    disk = replace(host, cfg=on_disk(tmp_path, optimizer=optimizer, cache_rows=cached))
    ours, other = train_one(SINGLE, disk), train_one(SINGLE, host)
    assert ours.losses == other.losses
    assert all(torch.equal(ours.state[name], other.state[name]) for name in other.state)
    assert (ours.stats["disk_read_bytes"] > 0) == (cached < 97 and cached != 1000)
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_on_disk_equal_two_ranks_in_memory(tmp_path):
    host = Run(steps=6, prefetch="before_step")
    disk = replace(host, cfg=on_disk(tmp_path, cache_rows=9))
    for memory, file in zip(*run_all([host, disk], 2), strict=True):
        assert memory.losses == file.losses
        assert all(torch.equal(memory.state[name], file.state[name]) for name in memory.state)


def test_saved_rows_resume_on_another_tier_bit_for_bit(tmp_path):
    disk = Run(on_disk(tmp_path, cache_rows=9), steps=5)
    pieces = []
    table = make_table(SINGLE, disk)
    train(SINGLE, disk, table)
    for piece in table.state_chunks(2000):
        pieces.append({name: value.clone() for name, value in piece.items()})
    assert len(pieces) > 5
    table.close()
    for cfg in (TableConfig(), disk.cfg):
        other = make_table(SINGLE, replace(disk, cfg=cfg))
        other.load_shards(pieces)
        losses = train(SINGLE, disk, other, first=5, last=9)
        assert losses == train_one(SINGLE, Run(steps=9)).losses[5:]
        other.close()


def evicting_table(path):
    """A table whose row 0 has been written to the file and has left the cache."""
    table = make_table(SINGLE, Run(on_disk(path, cache_rows=4)))
    for row in range(12):
        rows = table.fetch(torch.tensor([row]))
        rows.whole().sum().backward()
        table.accumulate(rows)
        table.step(0.1)
    table.flush()
    return table, next(path.iterdir())


def test_corrupt_record_stops_the_run_with_file_and_row(tmp_path):
    table, file = evicting_table(tmp_path)
    with file.open("r+b") as stream:
        stream.seek(17)
        stream.write(b"\x01")
    with pytest.raises(TableError, match=rf"{file}: the record of local row 0 .*checksum"):
        table.fetch(torch.tensor([0])).whole()
    with pytest.raises(TableError, match="local row 0"):
        table.fetch(torch.tensor([50])).whole()
    table.close()


def test_record_of_another_row_is_not_taken_for_this_one(tmp_path):
    table, file = evicting_table(tmp_path)
    size = record_bytes(table.layout)
    with file.open("r+b") as stream:
        stream.seek(size)
        other = stream.read(size)
        stream.seek(0)
        stream.write(other)
    with pytest.raises(TableError, match="local row 0"):
        table.fetch(torch.tensor([0])).whole()
    table.close()


def test_zeroed_record_is_not_taken_for_a_fresh_one(tmp_path):
    table, file = evicting_table(tmp_path)
    with file.open("r+b") as stream:
        stream.write(bytes(record_bytes(table.layout)))
    with pytest.raises(TableError, match="local row 0"):
        table.fetch(torch.tensor([0])).whole()
    table.close()


def test_cut_file_is_a_short_read_with_file_and_row(tmp_path):
    file = RecordFile(tmp_path / "t.rows", 4, 2 * SECTOR, on_disk(tmp_path))
    buffer = memoryview(mmap.mmap(-1, 8 * SECTOR))
    buffer[:] = bytes(range(256)) * 16
    file.write([3, 1], buffer, [0, 2])
    file.read([1, 3], buffer, [1, 3])
    assert buffer[2 * SECTOR : 4 * SECTOR] == buffer[6 * SECTOR :] == bytes(range(256)) * 4
    os.truncate(file.path, 7 * SECTOR)
    with pytest.raises(
        TableError, match=rf"{file.path}: read 512 of the 1024 bytes of local row 3"
    ):
        file.read([1, 3], buffer, [1, 3])
    file.close()


def test_cut_file_stops_the_run(tmp_path):
    table, file = evicting_table(tmp_path)
    os.truncate(file, 100)
    with pytest.raises(TableError, match="local row 0"):
        table.fetch(torch.tensor([0])).whole()
    table.close()


def test_full_disk_while_writing_stops_the_run_with_file_and_row(tmp_path, monkeypatch):
    table, file = evicting_table(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(TableError, match=rf"{file}: record of local row \d+: No space left"):
        table.fetch(torch.tensor([60, 61, 62, 63])).whole()
    table.close()


def test_short_write_stops_the_run_with_file_and_row(tmp_path, monkeypatch):
    table, file = evicting_table(tmp_path)
    written = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda f, pieces, at: written(f, pieces, at) - SECTOR)
    with pytest.raises(TableError, match=rf"{file}: wrote \d+ of the \d+ bytes of local row \d+"):
        table.fetch(torch.tensor([60, 61, 62, 63])).whole()
    table.close()


def test_disk_without_the_blocks_is_refused_before_training(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TableError, match=r"t-rank0\.rows: no room for .* bytes: No space left"):
        make_table(SINGLE, Run(on_disk(tmp_path)))


def test_table_larger_than_the_disk_is_refused_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(table_nvme.shutil, "disk_usage", lambda _: type("U", (), {"free": 5000}))
    with pytest.raises(TableError, match=f"need {97 * SECTOR:,} bytes.*disk.*5,000 bytes"):
        make_table(SINGLE, Run(on_disk(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_cache_larger_than_memory_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(table_nvme, "available_host_bytes", lambda: 1000)
    with pytest.raises(TableError, match=r"host memory for the cache.*smaller cache_rows"):
        make_table(SINGLE, Run(on_disk(tmp_path)))


def test_two_runs_cannot_share_a_file(tmp_path):
    table = make_table(SINGLE, Run(on_disk(tmp_path)))
    with pytest.raises(TableError, match="another process uses this file"):
        make_table(SINGLE, Run(on_disk(tmp_path)))
    table.close()


def test_file_system_without_direct_io_is_refused_unless_told_otherwise(tmp_path, monkeypatch):
    opened = os.open

    def no_direct(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", no_direct)
    layout = RowLayout.of("adam", 4, 1)
    with pytest.raises(TableError, match=r"no O_DIRECT.*direct: false"):
        NvmeTier(tmp_path / "t.rows", 10, layout, on_disk(tmp_path), TorchRows())
    NvmeTier(tmp_path / "t.rows", 10, layout, on_disk(tmp_path, direct=False), TorchRows()).close()


def test_file_left_by_a_killed_run_is_replaced(tmp_path):
    (tmp_path / "t-rank0.rows").write_bytes(b"left behind" * 10_000)
    result = train_one(SINGLE, Run(on_disk(tmp_path, cache_rows=5), steps=3))
    assert result.losses == train_one(SINGLE, Run(steps=3)).losses


def test_files_of_ranks_that_a_killed_run_had_more_of_give_their_room(tmp_path, monkeypatch):
    for name in ("t-rank0.rows", "t-rank1.rows", "t-rank12.rows", "t-rank2.rows", "u-rank1.rows"):
        (tmp_path / name).write_bytes(b"left behind" * 10_000)
    left = (tmp_path / "t-rank1.rows").stat().st_blocks * 512
    with (tmp_path / "t-rank2.rows").open() as used:
        # Another run's, which goes on.
        fcntl.flock(used, fcntl.LOCK_EX)
        run = Run(on_disk(tmp_path, cache_rows=5), rows=2000)
        # The rank's own file gives its room, and so do those of ranks 1 and 12.
        free = 2000 * SECTOR - 3 * left

        def disk_of(free_bytes):
            usage = type("U", (), {"free": free_bytes})
            monkeypatch.setattr(table_nvme.shutil, "disk_usage", lambda _: usage)

        disk_of(free - 1)
        with pytest.raises(TableError, match="disk"):
            make_table(SINGLE, run)
        disk_of(free)
        table = make_table(SINGLE, run)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["t-rank0.rows", "t-rank2.rows", "u-rank1.rows"]
        table.close()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a tmpfs")
def test_works_without_direct_io_on_tmpfs(tmp_path_factory):
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        run = Run(on_disk(folder, cache_rows=5, direct=False), steps=3)
        assert train_one(SINGLE, run).losses == train_one(SINGLE, Run(steps=3)).losses


def test_records_are_whole_sectors_with_room_for_the_checksum():
    assert record_bytes(RowLayout.of("adam", 1, 1)) == SECTOR
    assert record_bytes(RowLayout({"weight": 126})) == SECTOR
    assert record_bytes(RowLayout({"weight": 127})) == 2 * SECTOR


def test_cache_keeps_frequent_rows_and_those_in_use():
    cache = SlotCache(100, 8)

    def use(*rows):
        index = torch.tensor(rows)
        slots, absent = cache.find(index)
        if absent.any():
            free, _, _ = cache.evict(int(absent.sum()), slots[~absent])
            assert not set(free.tolist()) & set(slots[~absent].tolist())
            cache.put(index[absent], free)
            slots[absent] = free
        cache.touch(slots, write=False)
        return int((~absent).sum())

    for _ in range(4):
        use(1, 2, 3)
    for row in range(10, 90, 2):
        use(row, row + 1)
        use(1, 2, 3)
    assert use(1, 2, 3) == 3
    found = [int(s) for s in cache.find(torch.arange(100))[0] if s >= 0]
    assert sorted(found) == list(range(8))
    assert use(*range(20, 28)) <= 2
    with pytest.raises(ValueError, match="9 rows"):
        cache.evict(9, torch.empty(0, dtype=torch.int64))


def test_hit_rate_on_zipf_ids_is_that_of_the_frequent_rows(tmp_path):
    run = Run(on_disk(tmp_path, cache_rows=250), rows=1000, tokens=200, data_world=1, steps=40)
    stats = train_one(SINGLE, run).stats
    rate = stats["cache_hits"] / (stats["cache_hits"] + stats["cache_misses"])
    assert rate > 0.6
