"""One word per idea: the settings of techniques are words of docs/vocabulary.md."""

from __future__ import annotations

import dataclasses
import re

import pytest

from supple.technique import technique, techniques
from tests.guards import ROOT

TEXT = (ROOT / "docs" / "vocabulary.md").read_text(encoding="utf-8")
WORDS = {
    word
    for row in re.findall(r"^\| (`[^|]+`) \|", TEXT, re.M)
    for word in re.findall(r"`(\w+)`", row)
}


def test_the_vocabulary_is_read() -> None:
    assert {"sparsity", "temperature", "seed"} <= WORDS
    assert "ratio" not in WORDS


@pytest.mark.parametrize("key", techniques())
def test_settings_are_words_of_the_vocabulary(key: str) -> None:
    names = {field.name for field in dataclasses.fields(technique(key))}
    assert names <= WORDS, f"add to docs/vocabulary.md, or use its word: {names - WORDS}"
