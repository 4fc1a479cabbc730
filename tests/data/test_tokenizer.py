"""Every text must come back byte for byte, whatever is in it."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import CHUNK, PROBE, Tokenizer

AWKWARD = [
    "",
    " ",
    "\x00",
    "a\x00\x00b",
    "\r\n",
    "\r\n\r\n\t \n",
    "<s>",
    "</s><unk><pad><0x41>",
    "\u2581",
    " \u2581 \u2581\u2581",
    "\u2585\u2047 \u2047 ",
    "\u0301",
    "e\u0301",
    "\ufeff\ufffd\uffff",
    "\U0001f40d\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\ud7ff\ue000\U0010ffff",
    "12345 1e-9 0x1F",
    PROBE,
]
TEXT = st.text(
    st.one_of(
        st.characters(codec="utf-8"),
        st.sampled_from(" \t\r\n\x00\u2581\u2585<>s/x41_()=\u0301\U0001f40d"),
    )
)


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return Tokenizer.load(corpus / "tokenizer.model")


def assert_lossless(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not set(ids.tolist()) & {0, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_come_back_and_their_bytes_are_counted(
    tokenizer: Tokenizer, text: str
) -> None:
    assert_lossless(tokenizer, text)


@settings(max_examples=300)
@given(text=TEXT)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert_lossless(tokenizer, text)


@settings(max_examples=100)
@given(data=st.binary())
def test_any_utf8_comes_back(tokenizer: Tokenizer, data: bytes) -> None:
    assert_lossless(tokenizer, data.decode(errors="replace"))


@pytest.mark.parametrize("text", ["x", " ", "ab ", "\n", "日", "\u2581"])
def test_very_long_lines_come_back_in_linear_time(tokenizer: Tokenizer, text: str) -> None:
    long = text * (2 * CHUNK // len(text) + 17)
    # Its own, not that of others on a busy machine.
    started = time.process_time()
    assert_lossless(tokenizer, long)
    assert time.process_time() - started < 20


def test_cutting_a_long_document_before_a_space_changes_no_id(tokenizer: Tokenizer) -> None:
    line = "    return self.value + other.value  # and so on\n"
    whole = line * (2 * CHUNK // len(line))
    piece = tokenizer.encode(line * 8)
    ids = tokenizer.encode(whole)
    assert (ids[: len(piece)] == piece).all()
    # Every cut falls before a space: the pattern of the pieces goes on as if there were none.
    period = len(tokenizer.encode(line * 9)) - len(piece)
    assert (ids[period:-period] == ids[: -2 * period]).mean() > 0.999


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode("a\ud800b")


def test_ids_that_spell_no_utf8_decode_to_replacement_characters(tokenizer: Tokenizer) -> None:
    first_byte = tokenizer.encode("\u2581")[:1]
    assert tokenizer.decode(first_byte) == "\ufffd"
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.eos_id]) == ""


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, bad: int) -> None:
    with pytest.raises(ValueError, match="ids must be in 0"):
        tokenizer.decode([bad])


def test_training_twice_gives_the_same_model_with_the_size_asked_for(texts: Path) -> None:
    sample = [p.read_text() for p in sorted(texts.rglob("*.py"))]
    one, two = (Tokenizer.train(sample, 700) for _ in range(2))
    assert one.size == 700
    assert one.hash == two.hash


def test_low_ids_among_the_merges_are_the_frequent_ones(tokenizer: Tokenizer, texts: Path) -> None:
    counts: Counter[int] = Counter()
    for path in texts.rglob("*.py"):
        counts.update(tokenizer.encode(path.read_text()).tolist())
    single = {i for i in range(tokenizer.size) if len(tokenizer.piece(i)) == 1}
    merges = [i for i in range(260, tokenizer.size) if i not in single]
    quarter = len(merges) // 4
    first, last = (
        np.mean([counts[i] for i in part]) for part in (merges[:quarter], merges[-quarter:])
    )
    assert first > 2 * last


def test_a_size_that_does_not_fit_the_text_is_refused_with_one_that_does() -> None:
    text = ["def f(x):\n    return x\n" * 4]
    with pytest.raises(ValueError, match=r"too large for this corpus.* set vocab_size to \d+"):
        Tokenizer.train(text, 5000)
    with pytest.raises(ValueError, match=r"too small: this corpus needs at least \d+"):
        Tokenizer.train(text, 100)
    with pytest.raises(ValueError, match="no text"):
        Tokenizer.train([], 600)


def test_a_file_that_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a sentencepiece model"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "no pad id"),
        ({"pad_id": 3}, "0 of the 256 byte pieces"),
        ({"pad_id": 3, "byte_fallback": True}, "not lossless"),
    ],
)
def test_a_tokenizer_that_loses_text_is_refused(
    texts: Path, options: dict[str, object], reason: str
) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((texts / "copy.py").read_text().splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        minloglevel=2,
        **options,
    )
    with pytest.raises(ValueError, match=reason):
        Tokenizer(model.getvalue())


def test_a_tokenizer_process_loads_neither_torch_nor_streaming() -> None:
    code = (
        "import sys, data.encode_pool; "
        "print([m for m in ('torch', 'streaming', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
