"""Which rows a comparison has, from what was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from adamerging.evaluation.entries import wanted
from adamerging.evaluation.planning import merged_rows
from adamerging.evaluation.settings import Entry
from adamerging.recipe import make_recipe


@pytest.mark.parametrize(
    ("entry", "rows"),
    [
        ({"adapt": {"steps": 1}}, [0, 1]),
        ({"adapt": {"steps": 1, "seed": 5}}, [5]),
        ({"method": "dare"}, [0, 1]),
        ({"method": "dare", "options": {"seed": 5}}, [5]),
        ({"method": "ties"}, [None]),
    ],
)
def test_an_entry_keeps_the_seed_it_names(entry: dict[str, Any], rows: list[int | None]) -> None:
    recipe = make_recipe({"base": "base", "experts": {"a": "a", "b": "b"}})
    found = merged_rows(("a", "b"), ("a",), wanted(recipe, [{"it": Entry(**entry)}]), [0, 1])
    assert [row.seed for row in found] == rows
    for row in found:
        assert row.wanted is not None
        (made,) = row.wanted.candidates(row.seed)
        assert (made.adapt.seed if made.adapt else made.method.seed if made.method else None) == row.seed
