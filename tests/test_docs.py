"""What the documentation says of the methods is what the registry says."""

from __future__ import annotations

from pathlib import Path

import pytest

from adamerging.catalogue import Listing, catalogue
from adamerging.methods import methods

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0].strip(): part for part in PAGE.split("\n## ")[1:]}
WORDS = {True: "true", False: "false", None: "none"}


def as_written(default: object) -> str:
    return WORDS[default] if default is None or isinstance(default, bool) else str(default)


@pytest.mark.parametrize("name", methods())
def test_every_method_has_its_section_and_its_line_in_the_table(name: str) -> None:
    assert name in SECTIONS
    assert f"| [`{name}`](#{name}) |" in PAGE


@pytest.mark.parametrize("name", methods())
def test_every_option_is_described_with_its_true_default(name: str) -> None:
    rows = [line for line in SECTIONS[name].splitlines() if line.startswith("| `")]
    described = {tuple(cell.strip(" `") for cell in row.split("|")[1:3]) for row in rows}
    true = {(option, as_written(default)) for option, (_, default) in methods()[name].options.items()}
    assert described == true


@pytest.mark.parametrize("listing", catalogue().values(), ids=lambda listing: listing.name)
def test_what_each_needs_leaves_and_costs_is_what_the_command_says(listing: Listing) -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith(f"| [`{listing.name}`](")]
    assert [row for row in rows if row.endswith(f" | {listing.needs} | {listing.leaves} | {listing.cost} |")]
