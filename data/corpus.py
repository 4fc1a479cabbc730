"""Documents from folders, globs, JSON lines, text files and Python's own standard library.

| input | documents |
|---|---|
| `stdlib` | the `.py` files of the running Python's standard library, one document each |
| a folder | its files, recursively; hidden ones and links to folders are left out |
| a glob (`*`, `?`, `[`; `**` for any depth) | the matching files |
| a file | itself |

A file ending in `.jsonl` holds a document per line under one key; any other file is a document as a
whole. Either may be compressed (`.gz`, `.zst`). Files that are not UTF-8 are skipped and counted
when a folder, a glob or `stdlib` led to them, and an error when named directly; a bad line of JSON
is always an error. Empty documents are skipped and counted. The order is fixed: inputs as given,
files sorted by name.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
import os
import platform
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import zstandard

STDLIB = "stdlib"
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
_COMPRESSION = (".gz", ".zst")


class Document(NamedTuple):
    """One document: where it came from (`file` or `file:line`) and its text."""

    name: str
    text: str


class Source(NamedTuple):
    """One input file: its path, its name below the input that led to it, its size in bytes."""

    path: Path
    name: str
    size: int
    named_directly: bool


@dataclass
class Skipped:
    """What was left out of the last pass over a corpus, in files or documents."""

    not_utf8: int = 0
    empty: int = 0
    examples: list[str] = field(default_factory=list)


class Corpus:
    """The documents of some inputs; iterate as often as needed, nothing is held in memory.

    Attributes:
        sources: the files, in order.
        disk_bytes: their total size on disk.
        skipped: what the last complete pass left out.
    """

    def __init__(self, inputs: Sequence[str], text_key: str = "text") -> None:
        """Find the files.

        Args:
            inputs: see the module's table.
            text_key: key of the text in JSON lines.

        Raises:
            ValueError: an input names no file.
        """
        if not inputs:
            raise ValueError("no input: give a folder, a glob, files, or stdlib")
        self.inputs = tuple(inputs)
        self.text_key = text_key
        self.sources = [source for spec in inputs for source in _sources(spec)]
        self.disk_bytes = sum(s.size for s in self.sources)
        self.skipped = Skipped()
        self._done_bytes = 0
        self._open_file: IO[bytes] | None = None

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents in order.

        Raises:
            ValueError: a line or a directly named file that cannot be read as text.
            OSError: a file that vanished or may not be read.
        """
        self.skipped = Skipped()
        self._done_bytes = 0
        for source in self.sources:
            yield from self._read(source)
            self._done_bytes += source.size

    @property
    def read_bytes(self) -> int:
        """Bytes on disk that the pass under way has gone through (for progress)."""
        try:
            return self._done_bytes + (self._open_file.tell() if self._open_file else 0)
        except ValueError:
            return self._done_bytes

    def describe(self) -> dict[str, Any]:
        """Return what identifies the inputs, without absolute paths: same files, same answer."""
        digest = hashlib.sha256()
        for s in self.sources:
            digest.update(f"{s.name}\0{s.size}\0".encode(errors="surrogateescape"))
        described = {
            "inputs": [s if s == STDLIB else Path(s).name for s in self.inputs],
            "text_key": self.text_key,
            "files": len(self.sources),
            "disk_bytes": self.disk_bytes,
            "fingerprint": digest.hexdigest(),
        }
        if STDLIB in self.inputs:
            described["python"] = platform.python_version()
        return described

    def _read(self, source: Source) -> Iterator[Document]:
        with self._opened(source) as stream:
            if _bare_suffix(source.path) == ".jsonl":
                documents = self._read_lines(source, stream)
            else:
                documents = self._read_whole(source, stream)
            for document in documents:
                if document.text:
                    yield document
                else:
                    self.skipped.empty += 1

    @contextmanager
    def _opened(self, source: Source) -> Iterator[IO[bytes]]:
        with source.path.open("rb") as raw:
            self._open_file = raw
            try:
                suffix = source.path.suffix.lower()
                if suffix == ".gz":
                    with gzip.GzipFile(fileobj=raw) as unzipped:
                        yield io.BufferedReader(unzipped)
                elif suffix == ".zst":
                    yield io.BufferedReader(_ZstdReader(raw), 1 << 17)
                else:
                    yield raw
            except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as e:
                raise ValueError(f"{source.path} is damaged or cut short: {e}") from e
            finally:
                self._open_file = None

    def _read_whole(self, source: Source, stream: IO[bytes]) -> Iterator[Document]:
        data = stream.read()
        try:
            text = data.decode()
        except UnicodeDecodeError as e:
            if source.named_directly:
                raise ValueError(
                    f"{source.path}: byte {e.start} ({data[e.start]:#04x}) is not UTF-8. Convert "
                    f"the file (iconv -t UTF-8), or leave it out"
                ) from e
            self.skipped.not_utf8 += 1
            if len(self.skipped.examples) < 5:
                self.skipped.examples.append(source.name)
            return
        yield Document(source.name, text)

    def _read_lines(self, source: Source, stream: IO[bytes]) -> Iterator[Document]:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield Document(f"{source.name}:{number}", self._text(source, number, line))

    def _text(self, source: Source, number: int, line: bytes) -> str:
        where = f"{source.path}:{number}"
        try:
            entry = json.loads(line)
        except UnicodeDecodeError as e:
            raise ValueError(f"{where}: byte {e.start} of the line is not UTF-8") from e
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{where}: not JSON ({e}): {_shown(line)}") from e
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object, found {_shown(line)}")
        if self.text_key not in entry:
            raise ValueError(
                f"{where}: no key '{self.text_key}', found {sorted(entry)}: name the right one "
                f"with --text-key"
            )
        text = entry[self.text_key]
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: '{self.text_key}' must be a string, found {type(text).__name__}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ValueError(
                f"{where}: character {e.start} of '{self.text_key}' is half of a surrogate pair "
                f"({text[e.start]!r}), which is not valid Unicode"
            ) from e
        return text


class _ZstdReader(io.RawIOBase):
    """Frames of zstd, decompressed; unlike the library's reader it notices a missing end."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            unused = self._frame.unused_data if self._frame.eof else b""
            data = unused or self._raw.read(1 << 17)
            if self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
                self._inside = False
            if not data:
                if self._inside:
                    raise EOFError("the last frame has no end")
                return 0
            self._inside = True
            self._ready = memoryview(self._frame.decompress(data))
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _sources(spec: str) -> Iterator[Source]:
    if spec == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        found = [p for p in _walk(root, _NOT_STDLIB) if p.suffix == ".py"]
    elif Path(spec).is_dir():
        root = Path(spec)
        found = list(_walk(root, set()))
    elif Path(spec).exists():
        path = Path(spec)
        yield Source(path, path.name, path.stat().st_size, named_directly=True)
        return
    elif glob.has_magic(spec):
        root = Path(_glob_root(spec))
        found = [p for p in map(Path, glob.glob(spec, recursive=True)) if p.is_file()]
    else:
        raise ValueError(
            f"input '{spec}' does not exist: give a folder, a glob, a file, or '{STDLIB}'"
        )
    if not found:
        raise ValueError(f"input '{spec}' matches no file")
    for path in sorted(found, key=lambda p: p.as_posix()):
        yield Source(path, path.relative_to(root).as_posix(), path.stat().st_size, False)


def _walk(root: Path, excluded: set[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [d for d in folders if not d.startswith(".") and d not in excluded]
        for name in files:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _glob_root(spec: str) -> str:
    parts = Path(spec).parts
    plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:plain])) if plain else "."


def _bare_suffix(path: Path) -> str:
    """The suffix below a compression's: `.jsonl` for `a.jsonl.gz`."""
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSION else path
    return name.suffix.lower()


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")
