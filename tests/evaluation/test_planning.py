"""Which rows a comparison has, from what was asked for."""

from __future__ import annotations

from typing import Any

import pytest

from adamerging.errors import UsageError
from adamerging.evaluation.entries import wanted
from adamerging.evaluation.planning import Planned, merged_rows, outlook
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


def rows_of(*methods: dict[str, Entry], seeds: tuple[int, ...] = (0,)) -> list[Planned]:
    recipe = make_recipe({"base": "base", "experts": {"a": "a", "b": "b"}})
    return merged_rows(("a", "b"), ("a",), wanted(recipe, methods), seeds)


def test_the_outlook_counts_the_steps_of_what_is_yet_to_be_learned() -> None:
    swept = {"adapt": {"preset": "paper", "steps": 3}, "sweep": {"adapt.lr": [0.1, 0.2]}}
    masked = {"adapt": {"preset": "concrete", "steps": 10, "mask": {"steps": 5}, "seed": 0}}
    rows = rows_of(
        {"swept": Entry(**swept)}, {"masked": Entry(**masked)}, {"ties": Entry(method="ties")}, seeds=(0, 1)
    )
    found = outlook(rows, set())
    assert (found.rows, found.kept, found.learning, found.steps) == (4, 0, 3, 2 * 2 * 3 + 15)
    assert str(found) == "4 rows; 3 to learn, 27 steps in all"
    rest = outlook(rows, {row.name for row in rows if row.label != "masked"})
    assert str(rest) == "4 rows, 3 of them kept; 1 to learn, 15 steps in all"
    assert str(outlook(rows, {row.name for row in rows})) == "4 rows, 4 of them kept"


def test_many_steps_are_told_with_their_time() -> None:
    rows = rows_of(
        {"paper": Entry(adapt={"preset": "paper", "steps": 100})},
        {"short": Entry(adapt={"preset": "paper", "steps": 20, "batch_size": 2})},
    )
    pace = {16: 0.5, 2: 0.1}
    found = outlook(rows, set(), anew=2, pace=lambda adapt: pace[adapt.batch_size])
    assert found.steps == 3 * (100 + 20) and found.seconds == pytest.approx(3 * (50 + 2))
    assert str(found) == "2 rows; 2 to learn, 360 steps in all, 2 min 36 s or more"
    assert outlook(rows, set(), pace=lambda _: 1 / 0).seconds is None  # few: not tried
    unknown = outlook(rows, set(), anew=2, pace=lambda adapt: None if adapt.batch_size == 2 else 0.5)
    assert unknown.seconds is None and str(unknown).endswith("360 steps in all")


def test_statistics_are_kept_by_a_static_merge_alone() -> None:
    rows = rows_of({"kept": Entry(method="ties", batchnorm="keep")}, {"usual": Entry(method="ties")})
    keeps = [row.wanted.candidates()[0].keeps_statistics for row in rows if row.wanted]
    assert keeps == [True, False]
    with pytest.raises(UsageError, match=r"adapt: \{batchnorm: keep\}"):
        rows_of({"learned": Entry(adapt="paper", batchnorm="keep")})


def test_a_chain_with_its_own_seeds_has_no_others() -> None:
    fixed, open_ = {"dare": {"seed": 5}}, {"dare": {}}
    assert [row.seed for row in rows_of({"it": Entry(method=[fixed])}, seeds=(0, 1))] == [None]
    assert [row.seed for row in rows_of({"it": Entry(method=[fixed, open_])}, seeds=(0, 1))] == [0, 1]


def test_a_sweep_over_the_seed_leaves_no_other() -> None:
    swept = {"static": Entry(method="dare", sweep={"options.seed": [1, 2]})}
    learned = {"learned": Entry(adapt={"steps": 1}, sweep={"adapt.seed": [1, 2]})}
    assert [row.seed for row in rows_of(swept, learned, seeds=(0, 1))] == [None, None]


AVERAGES = [{"average": None}, {"average": Entry(method="average")}, {"average": Entry(method=["average"])}]


@pytest.mark.parametrize("entry", AVERAGES)
def test_the_plain_average_is_there_anyway(entry: dict[str, Entry]) -> None:
    assert rows_of(entry) == []
    assert [row.label for row in rows_of({"mean": Entry(method="average")})] == ["mean"]


@pytest.mark.parametrize(
    ("label", "entry"),
    [
        ("base", {"method": "ties"}),
        ("experts", {"method": "ties"}),
        ("expert: a", {"adapt": "paper"}),
        ("average", {"method": "ties"}),
        ("average", {"batchnorm": "keep"}),
        ("average", {"scale": 0.5}),
        ("average", {"adapt": "paper"}),
        ("average", {"sweep": {"scale": [0.5, 1.0]}}),
    ],
)
def test_no_merge_takes_the_name_of_a_row_that_is_there_anyway(label: str, entry: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"'{label}' is the name of the row .*call this merge otherwise"):
        rows_of({label: Entry(**entry)})


def test_the_recipes_own_average_is_not_dropped_where_it_is_another() -> None:
    fields = {"base": "base", "experts": {"a": "a", "b": "b"}, "method": "average"}
    assert merged_rows(("a", "b"), ("a",), wanted(make_recipe(fields), []), [0]) == []
    with pytest.raises(UsageError, match="'average' is the name of the row"):
        wanted(make_recipe({**fields, "scale": 0.5}), [])


def test_an_oracle_is_not_taken_for_another_row() -> None:
    oracle = Entry(method="ties", sweep={"scale": [1.0, 2.0]}, choose_on="test")
    with pytest.raises(UsageError, match="given twice"):
        rows_of({"bound (oracle)": Entry(method="ties")}, {"bound": oracle})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"method": "ties", "sweep": {"adapt.steps": [1]}}, r"it: a sweep over adapt.NAME .*static merge"),
        ({"adapt": "paper", "sweep": {"scale": [1, 2]}}, "it: scale and adapt exclude each other"),
        ({"adapt": "paper", "sweep": {"options.density": [1]}}, "it: options and adapt exclude"),
        ({"adapt": "paper", "scale": 5.0, "options": {"nonsense": 3}}, "it: options, scale and adapt"),
        ({"adapt": "paper", "method": "ties"}, "it: method and adapt exclude each other"),
    ],
)
def test_settings_of_the_other_kind_of_merge_are_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        rows_of({"it": Entry(**entry)})


def test_settings_of_a_static_merge_are_refused_under_the_name_of_a_preset() -> None:
    with pytest.raises(UsageError, match="paper: scale and adapt exclude each other"):
        rows_of({"paper": Entry(scale=0.5)})
