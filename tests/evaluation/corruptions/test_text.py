"""Edits of texts: one a word, at the stated rate, and never a text without words."""

from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adamerging.evaluation.corruptions.table import CORRUPTIONS, names_for
from adamerging.evaluation.corruptions.text import (
    NEIGHBOURS,
    SHARES,
    casing,
    corrupt_text,
    deletion,
    insertion,
    keyboard,
    swap,
)

NAMES = names_for("text")
WORDS = ["these", "eight", "plain", "words", "should", "always", "accept", "edits"]


def edit_once(name: str, text: str, severity: int, seed: int = 0) -> str:
    return corrupt_text(text, CORRUPTIONS[name].apply, severity, Random(seed))


@given(st.text(), st.sampled_from(NAMES), st.integers(1, 5), st.integers(0, 2**64))
def test_space_stays_and_no_word_vanishes(text: str, name: str, severity: int, seed: int) -> None:
    changed = edit_once(name, text, severity, seed)
    assert re.findall(r"\s+", changed) == re.findall(r"\s+", text)
    assert len(changed.split()) == len(text.split())
    assert bool(changed.strip()) == bool(text.strip())
    assert edit_once(name, text, severity, seed) == changed


@given(st.text(min_size=1).filter(lambda word: not re.search(r"\s", word)), st.integers(0, 2**32))
def test_each_edit_does_what_it_says(word: str, seed: int) -> None:
    swapped = swap(word, Random(seed))
    assert swapped is None or (swapped != word and sorted(swapped) == sorted(word))
    shorter = deletion(word, Random(seed))
    assert shorter is None or any(word[:i] + word[i + 1 :] == shorter for i in range(len(word)))
    cased = casing(word, Random(seed))
    assert cased is None or (cased != word and len(cased) == len(word))
    other = keyboard(word, Random(seed))
    if other is not None:
        [(one, two)] = [(a, b) for a, b in zip(word, other, strict=True) if a != b]
        assert two.lower() in NEIGHBOURS[one.lower()] and two.isupper() == one.isupper()
    longer = insertion(word, Random(seed))
    assert longer is None or any(longer[:i] + longer[i + 1 :] == word for i in range(len(longer)))


@pytest.mark.parametrize("severity", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", NAMES)
def test_severity_is_the_share_of_words(name: str, severity: int) -> None:
    text = " ".join(WORDS * 500)
    changed = edit_once(name, text, severity).split()
    share = sum(a != b for a, b in zip(changed, text.split(), strict=True)) / len(changed)
    assert share == pytest.approx(SHARES[severity - 1], abs=0.03)  # four deviations


def test_words_that_an_edit_does_not_fit_are_left_alone() -> None:
    assert [edit("aa", Random(0)) for edit in (swap,)] == [None]
    assert deletion("a", Random(0)) is None and deletion("a!", Random(0)) is None
    assert casing("12", Random(0)) is None and keyboard("é!", Random(0)) is None
    assert CORRUPTIONS["typos"].apply("!", Random(0)) is None


def test_keys_touch_each_other_and_no_others() -> None:
    assert set(NEIGHBOURS["s"]) == set("awedxz") and set(NEIGHBOURS["p"]) == set("ol")
    assert all(one in NEIGHBOURS[two] for one, keys in NEIGHBOURS.items() for two in keys)
    assert len(NEIGHBOURS) == 26


def test_typos_mix_the_four_kinds() -> None:
    kinds = set()
    for seed in range(60):
        changed = CORRUPTIONS["typos"].apply("planet", Random(seed))
        kinds.add("swap" if sorted(changed) == sorted("planet") else len(changed) - 6)
    assert kinds == {"swap", -1, 0, 1}
