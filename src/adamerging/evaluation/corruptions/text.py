"""Noise as people make it when they type. One edit a word; severity is the share of words it touches."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from random import Random

SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Chance of each word to be touched at severities 1 to 5; words that an edit does not fit are left alone."""

Edit = Callable[[str, Random], str | None]
"""One word → the word with one edit, or None where the edit does not fit it."""

_WORD = re.compile(r"\S+")
_ROWS = (("qwertyuiop", 0.0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75))
"""The letters of a QWERTY keyboard, and how far each row is shifted to the right, in keys."""


def corrupt_text(text: str, edit: Edit, severity: int, random: Random) -> str:
    """Edit some words of a text; the space between them stays, and no word vanishes."""
    share = SHARES[severity - 1]

    def touch(word: re.Match[str]) -> str:
        if random.random() >= share:
            return word[0]
        edited = edit(word[0], random)
        return word[0] if edited is None else edited

    return _WORD.sub(touch, text)


def swap(word: str, random: Random) -> str | None:
    """Two neighbouring letters or digits change places."""
    at = _pick([i for i in range(len(word) - 1) if _differ(word[i], word[i + 1])], random)
    return None if at is None else word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def deletion(word: str, random: Random) -> str | None:
    """One letter or digit is left out, of words with two or more."""
    places = [i for i, letter in enumerate(word) if letter.isalnum()]
    at = _pick(places, random) if len(places) > 1 else None
    return None if at is None else word[:at] + word[at + 1 :]


def casing(word: str, random: Random) -> str | None:
    """Letters change between small and capital, each with chance one half, and one for sure."""
    places = [i for i, letter in enumerate(word) if _has_two_cases(letter)]
    sure = _pick(places, random)
    if sure is None:
        return None
    letters = list(word)
    for i in places:
        if i == sure or random.random() < 0.5:
            letters[i] = letters[i].swapcase()
    return "".join(letters)


def keyboard(word: str, random: Random) -> str | None:
    """One letter becomes that of a neighbouring key."""
    at = _pick(_on_keyboard(word), random)
    return None if at is None else word[:at] + _slip(word[at], random) + word[at + 1 :]


def insertion(word: str, random: Random) -> str | None:
    """A neighbouring key is hit besides the right one."""
    at = _pick(_on_keyboard(word), random)
    return None if at is None else word[: at + 1] + _slip(word[at], random) + word[at + 1 :]


def typos(word: str, random: Random) -> str | None:
    """One of swap, deletion, keyboard and insertion, by chance among those that fit."""
    edits: list[Edit] = [swap, deletion, keyboard, insertion]
    while edits:
        edited = edits.pop(int(random.random() * len(edits)))(word, random)
        if edited is not None:
            return edited
    return None


def _neighbours() -> Mapping[str, str]:
    """For every letter those on the keys that touch its own."""
    places = {
        letter: (column + shift, float(row))
        for row, (letters, shift) in enumerate(_ROWS)
        for column, letter in enumerate(letters)
    }
    return {
        letter: "".join(
            other
            for other, (right, down) in places.items()
            if other != letter and (right - x) ** 2 + (down - y) ** 2 < 1.7
        )
        for letter, (x, y) in places.items()
    }


NEIGHBOURS = _neighbours()


def _slip(letter: str, random: Random) -> str:
    keys = NEIGHBOURS[letter.lower()]
    key = keys[int(random.random() * len(keys))]
    return key.upper() if letter.isupper() else key


def _on_keyboard(word: str) -> list[int]:
    return [i for i, letter in enumerate(word) if letter.lower() in NEIGHBOURS]


def _differ(one: str, other: str) -> bool:
    return one != other and one.isalnum() and other.isalnum()


def _has_two_cases(letter: str) -> bool:
    swapped = letter.swapcase()
    return swapped != letter and len(swapped) == 1


def _pick(places: list[int], random: Random) -> int | None:
    return places[int(random.random() * len(places))] if places else None
