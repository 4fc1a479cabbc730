"""Documents come in a fixed order; what cannot be read is named, or counted where documented."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from data.corpus import Corpus

LINES = [{"text": "one"}, {"text": "two\n\x00"}, {"text": ""}, {"text": "drei \u2581"}]


def write_lines(path: Path, lines: list[dict[str, str]]) -> Path:
    content = "\n\n".join(json.dumps(line) for line in lines).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        half = len(content) // 2
        # Two frames, as parallel compressors write them.
        content = b"".join(zstandard.compress(c) for c in (content[:half], content[half:]))
    path.write_bytes(content)
    return path


def read(*inputs: Path | str, text_key: str = "text") -> list[tuple[str, str]]:
    return [(d.name, d.text) for d in Corpus([str(i) for i in inputs], text_key)]


def test_a_folder_gives_its_text_files_in_order_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.py", "a/z.txt", "a/b/c.md", ".hidden", ".git/config"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    corpus = Corpus([str(tmp_path)])
    assert [d.name for d in corpus] == ["a/b/c.md", "a/z.txt", "b.py"]
    assert (corpus.skipped.not_utf8, corpus.skipped.empty) == (1, 1)
    assert corpus.skipped.examples == ["latin.txt"]


def test_a_glob_gives_the_matching_files_only(tmp_path: Path) -> None:
    for name in ("src/a.py", "src/deep/b.py", "src/c.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert [n for n, _ in read(f"{tmp_path}/src/**/*.py")] == ["a.py", "deep/b.py"]
    assert [n for n, _ in read(f"{tmp_path}/*/*.py")] == ["src/a.py"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
def test_json_lines_give_a_document_per_line_plain_or_compressed(tmp_path: Path, name: str) -> None:
    corpus = Corpus([str(write_lines(tmp_path / name, LINES))])
    assert list(corpus) == [
        (f"{name}:1", "one"),
        (f"{name}:3", "two\n\x00"),
        (f"{name}:7", "drei \u2581"),
    ]
    assert corpus.skipped.empty == 1
    assert corpus.read_bytes == corpus.disk_bytes == (tmp_path / name).stat().st_size


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.txt.zst"])
def test_a_text_file_is_one_document_plain_or_compressed(tmp_path: Path, name: str) -> None:
    text = "first\r\nsecond\n\nthird"
    packed = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.rsplit(".", 1)[1])
    (tmp_path / name).write_bytes(packed(text.encode()) if packed else text.encode())
    assert read(tmp_path / name) == [(name, text)]


def test_the_key_of_the_text_can_be_chosen(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"body": "b", "text": "t"}])
    assert read(path, text_key="body") == [("x.jsonl:1", "b")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", r"x\.jsonl:2: not JSON .*broken"),
        (b'["a"]', r"x\.jsonl:2: expected an object, found '\[\"a\"\]'"),
        (b'{"body": "b", "id": 1}', r"x\.jsonl:2: no key 'text', found \['body', 'id'\]"),
        (b'{"text": 7}', r"x\.jsonl:2: 'text' must be a string, found int"),
        (b'{"text": "ab\\ud800"}', r"x\.jsonl:2: character 2 .*surrogate"),
        (b'{"text": "\xff"}', r"x\.jsonl:2: byte 10 of the line is not UTF-8"),
        (b"[" * 100_000, r"x\.jsonl:2: not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=reason):
        read(path)


def test_a_file_named_directly_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"ab\xffc")
    with pytest.raises(ValueError, match=r"x\.txt: byte 2 \(0xff\) is not UTF-8"):
        read(tmp_path / "x.txt")


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst"])
def test_a_compressed_file_that_was_cut_short_is_named(tmp_path: Path, name: str) -> None:
    path = write_lines(tmp_path / name, [{"text": str(i) * 50} for i in range(500)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{name} is damaged or cut short"):
        read(path)


def test_a_file_that_is_not_compressed_despite_its_name_is_named(tmp_path: Path) -> None:
    for name in ("x.txt.gz", "x.txt.zst"):
        (tmp_path / name).write_text("plain")
        with pytest.raises(ValueError, match=rf"{name} is damaged or cut short"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("spec", "reason"), [("nowhere", "does not exist"), ("*.nothing", "matches no file")]
)
def test_an_input_that_leads_nowhere_is_refused(tmp_path: Path, spec: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Corpus([str(tmp_path / spec)])
    with pytest.raises(ValueError, match="no input"):
        Corpus([])


def test_the_standard_library_is_sources_only_in_the_same_order_every_time() -> None:
    one, two = Corpus(["stdlib"]), Corpus(["stdlib"])
    names = [s.name for s in one.sources]
    assert one.sources == two.sources and names == sorted(names)
    assert {"abc.py", "json/decoder.py"} <= set(names)
    assert all(n.endswith(".py") for n in names)
    assert not [n for n in names if "site-packages" in n or "dist-packages" in n]


def test_the_description_changes_with_the_files_and_not_with_their_place(tmp_path: Path) -> None:
    for place in ("one", "two"):
        folder = tmp_path / place / "texts"
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text("same")
    one, two = (Corpus([str(tmp_path / p / "texts")]).describe() for p in ("one", "two"))
    assert one == two
    (tmp_path / "two/texts/b.txt").write_text("more")
    assert Corpus([str(tmp_path / "two/texts")]).describe()["fingerprint"] != one["fingerprint"]
