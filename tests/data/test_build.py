"""A build is deterministic, accounts for every byte, and is either finished or not there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
import time
import zlib
from pathlib import Path
from typing import Any

import psutil
import pytest

from data.build import build
from data.config import BuildConfig
from data.index import DataError, Index, check_hashes, read_index
from data.report import inspect, table, verify
from data.tokenizer import Tokenizer
from tests.data.conftest import SEQ_LEN, VOCAB, Loaders, recipe
from tests.processes import ended


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def documents(loader: Any, split: str, index: Index) -> list[bytes]:
    """Every document of a split, put together again from its samples."""
    samples = loader._samples
    stream: list[int] = []
    for i in range(index.splits[split].samples):
        tokens = samples[i]["tokens"][: samples[i]["used"]].tolist()
        stream += tokens if i == 0 else tokens[1:]
    tokenizer: Tokenizer = loader.tokenizer
    found, ids = [], []
    for token in stream:
        ids.append(token)
        if token == tokenizer.eos_id:
            assert ids[0] == tokenizer.bos_id and tokenizer.bos_id not in ids[1:]
            found.append(tokenizer.decode_bytes(ids))
            ids = []
    assert not ids
    return found


def test_the_bytes_do_not_depend_on_the_number_of_processes(
    texts: Path, corpus: Path, tmp_path: Path
) -> None:
    build(recipe(texts, workers=1), tmp_path / corpus.name, SEQ_LEN)
    assert files(tmp_path / corpus.name) == files(corpus)


def test_every_document_is_stored_once_and_every_byte_is_counted(
    texts: Path, corpus: Path, open_loader: Loaders
) -> None:
    index = read_index(corpus)
    stored: dict[str, list[bytes]] = {}
    for split, expected in index.splits.items():
        loader = open_loader(corpus, split, micro_batch=1, accumulation=1)
        stored[split] = documents(loader, split, index)
        assert len(stored[split]) == expected.documents
        assert sum(map(len, stored[split])) == expected.bytes
        token_bytes = loader.tokenizer.token_bytes
        labelled = sum(
            int(token_bytes[loader._samples[i]["tokens"][1:]].sum())
            for i in range(expected.samples)
        )
        assert labelled == expected.bytes
        lengths = [len(loader.tokenizer.encode(d.decode())) + 2 for d in stored[split]]
        assert sum(lengths) == expected.tokens
        assert expected.document_tokens["100%"] == max(lengths)
        assert expected.document_tokens["0%"] == min(lengths)
    everything = [d for split in stored.values() for d in split]
    assert sorted(everything) == sorted(p.read_bytes() for p in texts.rglob("*.py"))
    assert len(set(everything)) == len(everything)
    packed = zlib.compressobj(9, zlib.DEFLATED, 31)
    size = sum(len(packed.compress(d)) for d in stored["validation"]) + len(packed.flush())
    validation = index.splits["validation"]
    assert validation.gzip_bits_per_byte == pytest.approx(8 * size / validation.bytes)


def test_equal_documents_are_on_the_same_side(
    texts: Path, tmp_path: Path, open_loader: Loaders
) -> None:
    for copy in ("a", "b", "c"):
        shutil.copytree(texts, tmp_path / "thrice" / copy)
    out = tmp_path / "out"
    index = build(recipe(tmp_path / "thrice"), out, SEQ_LEN)
    sides = {
        split: documents(open_loader(out, split, 1, 1), split, index) for split in index.splits
    }
    assert not set(sides["train"]) & set(sides["validation"])
    for side in sides.values():
        assert len(side) == 3 * len(set(side))


def test_a_document_stays_on_its_side_when_others_are_added(
    texts: Path, corpus: Path, tmp_path: Path, open_loader: Loaders
) -> None:
    shutil.copytree(texts, tmp_path / "more")
    (tmp_path / "more" / "new.py").write_text("print('new')\n" * 40)
    index = build(recipe(tmp_path / "more"), tmp_path / "out", SEQ_LEN)
    before = documents(open_loader(corpus, "validation", 1, 1), "validation", read_index(corpus))
    after = documents(open_loader(tmp_path / "out", "validation", 1, 1), "validation", index)
    assert set(before) <= set(after) and len(after) <= len(before) + 1


def test_a_finished_build_is_reused_for_the_same_settings(
    texts: Path, copied: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in copied.rglob("*")}
    index = build(recipe(texts, workers=1), copied, SEQ_LEN)
    assert index == read_index(copied)
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*")} == before
    assert "already built" in capfd.readouterr().err


def test_other_settings_are_refused_with_the_differences(texts: Path, copied: Path) -> None:
    with pytest.raises(DataError) as refused:
        build(recipe(texts, vocab_size=700), copied, 2 * SEQ_LEN)
    message = str(refused.value)
    assert f"seq_len: {SEQ_LEN} there, {2 * SEQ_LEN} asked for" in message
    assert f"vocab_size: {VOCAB} there, 700 asked for" in message
    assert f"rm -r {copied}" in message and "another --out" in message


def test_changed_input_files_are_refused(texts: Path, copied: Path, tmp_path: Path) -> None:
    changed = tmp_path / texts.name
    shutil.copytree(texts, changed)
    (changed / "abc.py").write_text("shorter")
    with pytest.raises(DataError, match="fingerprint of the input files"):
        build(recipe(changed), copied, SEQ_LEN)


def test_a_folder_that_holds_something_else_is_left_alone(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("precious")
    with pytest.raises(DataError, match="not a finished corpus"):
        build(recipe(texts), out, SEQ_LEN)
    assert files(out) == {"chapter1.txt": b"precious"}


def test_a_tokenizer_can_be_reused(texts: Path, corpus: Path, tmp_path: Path) -> None:
    model = corpus / "tokenizer.model"
    index = build(recipe(texts, tokenizer=str(model)), tmp_path / "out", 32)
    assert index.tokenizer_sha256 == read_index(corpus).tokenizer_sha256
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == model.read_bytes()
    assert index.splits["train"].tokens == read_index(corpus).splits["train"].tokens


def test_the_tokenizer_is_trained_on_a_sample_of_bounded_size(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    train = Tokenizer.train

    def spy(sample: Any, vocab_size: int) -> Tokenizer:
        held = list(sample)
        seen.append(sum(len(t.encode()) for t in held))
        return train(held, vocab_size)

    monkeypatch.setattr(Tokenizer, "train", spy)
    (tmp_path / "in").mkdir()
    for i, path in enumerate(sorted(texts.rglob("*.py")) * 3):
        (tmp_path / "in" / f"{i}.py").write_bytes(path.read_bytes() + b"# %d\n" % i)
    build(recipe(tmp_path / "in", tokenizer_sample_mb=1), tmp_path / "out", SEQ_LEN)
    largest = max(p.stat().st_size for p in (tmp_path / "in").iterdir())
    assert 1_000_000 <= seen[0] < 1_000_000 + largest


def test_compressed_shards_hold_the_same_samples(
    texts: Path, corpus: Path, tmp_path: Path, open_loader: Loaders
) -> None:
    out = tmp_path / "zipped"
    index = build(recipe(texts, compression="zstd"), out, SEQ_LEN)
    assert all(s.file.endswith(".zstd") for s in index.splits["train"].shards)
    before = files(out)
    plain = open_loader(corpus).next_step()
    zipped = open_loader(out, cache=str(tmp_path / "cache")).next_step()
    assert [b.ids_T.tolist() for b in plain] == [b.ids_T.tolist() for b in zipped]
    assert files(out) == before, "the corpus itself must not be unpacked in place"


def test_no_validation_split_is_made_when_none_is_asked_for(texts: Path, tmp_path: Path) -> None:
    index = build(recipe(texts, validation_fraction=0.0), tmp_path / "out", SEQ_LEN)
    assert list(index.splits) == ["train"]


@pytest.mark.parametrize(("fraction", "split"), [(1e-9, "validation"), (1 - 1e-9, "train")])
def test_an_empty_split_is_an_error_with_the_remedy(
    texts: Path, corpus: Path, tmp_path: Path, fraction: float, split: str
) -> None:
    reused = str(corpus / "tokenizer.model")
    with pytest.raises(DataError, match=f"split '{split}'.*--validation_fraction"):
        build(
            recipe(texts, validation_fraction=fraction, tokenizer=reused),
            tmp_path / "out",
            SEQ_LEN,
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("validation_fraction", 1.0),
        ("shard_mb", 0),
        ("workers", -1),
        ("tokenizer_sample_mb", 0),
        ("vocab_size", 259),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key} must"):
        BuildConfig(**{key: value})  # type: ignore[arg-type]


BUILD = """
    from data.build import build
    from tests.data.conftest import recipe
    build(recipe({texts!r}), {out!r}, {seq_len})
"""
# Its end must not come before the test kills it.
UNFINISHED = """
    import time
    from data.encode_pool import EncodePool
    encode = EncodePool.encode
    def begin(self, batches):
        for ids in encode(self, batches):
            yield ids
            print("begun", flush=True)
            time.sleep(600)
    EncodePool.encode = begin
"""


def _start_build(out: Path, texts: Path, before: str = "") -> subprocess.Popen[bytes]:
    code = before + BUILD.format(texts=str(texts), out=str(out), seq_len=SEQ_LEN)
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def test_a_killed_build_looks_unfinished_leaves_no_process_and_is_cleared_away(
    texts: Path, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "many").mkdir()
    for i in range(30):
        shutil.copytree(texts, tmp_path / "many" / str(i))
    out = tmp_path / "out"
    with _start_build(out, tmp_path / "many", UNFINISHED) as process:
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        process.kill()
    assert not out.exists()
    assert len(list(tmp_path.glob(".out.build-*"))) == 1
    deadline = time.monotonic() + 120
    while not all(map(ended, workers)):
        assert time.monotonic() < deadline, "tokenizer processes outlive the build"
        time.sleep(0.05)
    build(recipe(texts), out, SEQ_LEN)
    assert list(tmp_path.glob(".out.build-*")) == []
    assert read_index(out).splits == read_index(corpus).splits


def test_two_builds_of_the_same_folder_at_once_both_end_well(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    both = [_start_build(out, texts) for _ in range(2)]
    assert [p.communicate(timeout=300) and p.returncode for p in both] == [0, 0]
    assert list(tmp_path.glob(".out.build-*")) == []
    assert verify(str(out)) > 0


def test_a_worker_that_dies_ends_the_build_with_a_message(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nexit 3\n")
    stub.chmod(0o755)
    monkeypatch.setattr("data.encode_pool.sys.executable", str(stub))
    with pytest.raises(RuntimeError, match="tokenizer process ended with code 3"):
        build(recipe(texts), tmp_path / "out", SEQ_LEN)
    assert not (tmp_path / "out").exists()


def test_hashes_find_a_changed_byte(copied: Path) -> None:
    index = read_index(copied)
    check_hashes(index, copied, "train")
    assert verify(str(copied)) == sum(s.bytes for x in index.splits.values() for s in x.shards)
    shard = copied / "train" / index.splits["train"].shards[-1].file
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=rf"{shard.name} is damaged: SHA-256"):
        verify(str(copied))


def test_inspect_shows_counts_and_decoded_text(corpus: Path, texts: Path) -> None:
    report = inspect(str(corpus))
    json.dumps(report)
    total = sum(s["bytes"] for s in report["splits"].values())
    assert total == sum(p.stat().st_size for p in texts.rglob("*.py"))
    shown = report["sample"]["text"]
    assert any(shown in p.read_text() for p in texts.rglob("*.py"))
    text = table(report)
    assert "train" in text and f"{VOCAB:,} ids" in text and shown in text
