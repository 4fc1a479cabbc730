"""Words of the command line are read, or refused with what would do."""

from __future__ import annotations

from argparse import ArgumentTypeError

import pytest

from launcher.options import Variant, variant

READ = variant({"all dense": ["--model.ffn.kind", "dense"], "sparse": []})


def test_a_variant_is_known_by_name_or_given_with_its_overrides() -> None:
    assert READ("all dense") == Variant("all dense", ["--model.ffn.kind", "dense"])
    assert READ("sparse") == Variant("sparse", [])
    given = "one thread=--model.deepembed.threads 1 --name 'a b'"
    assert READ(given) == Variant("one thread", ["--model.deepembed.threads", "1", "--name", "a b"])


@pytest.mark.parametrize("text", ["dense", "=--seed 1", ""])
def test_another_name_is_refused_with_those_that_are_known(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="none of 'all dense', 'sparse', and not 'NAME="):
        READ(text)
