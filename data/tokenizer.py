"""A lossless sentencepiece tokenizer: every UTF-8 text comes back from its ids byte for byte.

- Byte-pair encoding, because on source code it trains several times faster than the unigram model
  and needs fewer tokens per byte (the figures are in NOTES.md).
- No normalisation of any kind; digits one by one; characters outside the vocabulary become bytes.
- Ids 0…3 are unknown (never produced), begin, end and padding; 4…259 the bytes; then the merges in
  the order in which they were learnt, most frequent first; then the single characters, again most
  frequent first. Ids next to each other are about equally frequent, which is what dealing table
  rows out by id modulo world size relies on.

A model file is a protocol buffer: loading one runs no code.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece

Ids = npt.NDArray[np.int32]

SPACE_MARK = "\u2581"
"""sentencepiece writes a space as this character, and so cannot tell it from a real one."""

CHUNK = 1 << 18
"""Characters that go through the encoder at a time: bounds its memory on very long documents."""

TRAINING_LINE = 4096
"""Characters of text that the trainer sees as one sentence (line breaks inside it are learnt)."""

PROBE = (
    "a  b\t\r\n\x00 <s></s><unk><pad><0x41> \u2581\u2581x 1234 e\u0301 \u0301\ufeff\ufffd "
    "\U0001f40d\u2585 \u00a0\u3000 \uff21\u1100\u1161 "
)
"""What a tokenizer must give back unchanged before it is accepted."""


class Tokenizer:
    """Turns text into ids and back, losslessly.

    Attributes:
        model: the serialized sentencepiece model.
        hash: SHA-256 of `model`, hexadecimal.
        size: V, number of ids.
        bos_id, eos_id, pad_id: control ids: begin of document, end of document, padding.
        token_bytes: int32 [V], how many UTF-8 bytes of text each id stands for (control ids: 0).
            Over the ids of a text these sum to exactly its length in bytes.
    """

    def __init__(self, model: bytes, source: str = "the given tokenizer") -> None:
        """Load a serialized model; `source` names it in errors.

        Raises:
            ValueError: not a sentencepiece model, or one that is not lossless.
        """
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as e:
            raise ValueError(
                f"{source} is not a sentencepiece model ({len(model)} bytes): {e}"
            ) from e
        self.model = model
        self.hash = hashlib.sha256(model).hexdigest()
        self.size = int(self._sp.get_piece_size())
        self.bos_id, self.eos_id, self.pad_id = (
            int(i) for i in (self._sp.bos_id(), self._sp.eos_id(), self._sp.pad_id())
        )
        missing = [n for n in ("bos", "eos", "pad") if getattr(self, f"{n}_id") < 0]
        if missing:
            raise ValueError(f"{source} has no {' or '.join(missing)} id. {_REMEDY}")
        self._bytes_of = [self._surface(i) for i in range(self.size)]
        self.token_bytes: Ids = np.array([len(b) for b in self._bytes_of], dtype=np.int32)
        byte_ids = {b: i for i, b in enumerate(self._bytes_of) if self._sp.is_byte(i)}
        if len(byte_ids) != 256:
            raise ValueError(f"{source} has {len(byte_ids)} of the 256 byte pieces. {_REMEDY}")
        mark = [byte_ids[bytes([b])] for b in SPACE_MARK.encode()]
        self._mark: Ids = np.array(mark, dtype=np.int32)
        back = self.decode_bytes(self.encode(PROBE))
        if back != PROBE.encode():
            raise ValueError(
                f"{source} is not lossless: {PROBE!r} came back as "
                f"{back.decode(errors='replace')!r}. {_REMEDY}"
            )

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Load a model file.

        Raises:
            OSError: the file cannot be read.
            ValueError: see `Tokenizer`.
        """
        return cls(Path(path).read_bytes(), str(path))

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, character_coverage: float = 0.9995
    ) -> Tokenizer:
        """Learn a vocabulary of exactly `vocab_size` ids; the same texts give the same model.

        Args:
            texts: the sample to learn from; held in memory by sentencepiece.
            vocab_size: V, control ids and the 256 bytes included.
            character_coverage: share of the sample's characters that get an id of their own; the
                rarer ones are spelt as bytes.

        Raises:
            ValueError: no text, or a vocabulary size that this sample does not allow.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_training_lines(texts),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                character_coverage=character_coverage,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                split_digits=True,
                max_sentence_length=8 * TRAINING_LINE,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=3,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as e:
            raise ValueError(_training_error(str(e), vocab_size)) from e
        return cls(model.getvalue(), "the trained tokenizer")

    def save(self, path: str | Path) -> None:
        """Write the model file."""
        Path(path).write_bytes(self.model)

    def encode(self, text: str) -> Ids:
        """Return the ids of a text, int32, without begin and end.

        Raises:
            ValueError: the text holds a lone surrogate and so is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f"not valid Unicode: {e}") from e
        parts: list[Ids] = []
        for i, piece in enumerate(text.split(SPACE_MARK)):
            if i:
                parts.append(self._mark)
            parts.extend(self._encode_chunk(chunk) for chunk in _chunks(piece))
        return np.concatenate(parts) if parts else np.empty(0, np.int32)

    def decode_bytes(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> bytes:
        """Return the UTF-8 bytes that ids stand for; control ids stand for nothing.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        numbers = np.asarray(ids, dtype=np.int64).ravel()
        if numbers.size and (numbers.min() < 0 or numbers.max() >= self.size):
            raise ValueError(
                f"ids must be in 0…{self.size - 1}, got {numbers.min()}…{numbers.max()}"
            )
        return b"".join([self._bytes_of[i] for i in numbers.tolist()])

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """Return the text that ids stand for.

        The inverse of `encode`. Ids that do not spell valid UTF-8 (a model can produce such ones)
        give U+FFFD in those places.
        """
        return self.decode_bytes(ids).decode(errors="replace")

    def piece(self, token_id: int) -> str:
        """Return an id as text for people to read: `▁the`, `<0x0A>`, `<s>`."""
        return str(self._sp.id_to_piece(token_id))

    def _encode_chunk(self, text: str) -> Ids:
        return np.asarray(self._sp.encode(text, out_type=int), dtype=np.int32)

    def _surface(self, i: int) -> bytes:
        if self._sp.is_control(i) or self._sp.is_unknown(i):
            return b""
        piece = str(self._sp.id_to_piece(i))
        if self._sp.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE_MARK, " ").encode()


_REMEDY = (
    "Documents need one with begin, end and padding ids, byte fallback, identity normalisation, no "
    "dummy prefix and all whitespace kept: leave --tokenizer out and one is trained."
)


def _chunks(text: str) -> Iterator[str]:
    """Cut a text into runs of at most CHUNK characters, where possible before a space or break.

    No piece holds a space anywhere but at its start, so a cut before a run of spaces changes no id.
    """
    start = 0
    while len(text) - start > CHUNK:
        end = start + CHUNK
        cut = next((m.start() for m in re.finditer(r"(?<=[^ ]) ", text[end - 2048 : end])), None)
        end = end if cut is None else end - 2048 + cut
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts into what the trainer takes as sentences: about TRAINING_LINE characters each.

    Several lines together, so that pieces such as `):` + line break are learnt. The trainer skips
    sentences with a tab and reads U+2581 as a space: those two characters are left out.
    """
    for text in texts:
        for start in range(0, len(text), TRAINING_LINE):
            for part in re.split(f"[\t{SPACE_MARK}]", text[start : start + TRAINING_LINE]):
                if part:
                    yield part


def _training_error(message: str, vocab_size: int) -> str:
    if "!sentences_.empty()" in message:
        return "there is no text to train a tokenizer from: every document is empty"
    low = re.search(r"smaller than required_chars\.? *(\d+) vs (\d+)", message)
    high = re.search(r"set it to a value <= (\d+)", message)
    if high:
        return (
            f"vocab_size {vocab_size} is too large for this corpus, which has pieces for "
            f"{high[1]} ids at most: set vocab_size to {high[1]} or less, or add documents"
        )
    if low:
        return (
            f"vocab_size {vocab_size} is too small: this corpus needs at least {low[2]} ids (4 "
            f"control ids, 256 bytes and its characters)"
        )
    return f"sentencepiece could not train a tokenizer of {vocab_size} ids: {message}"
