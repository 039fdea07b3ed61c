"""Names of methods on the command line of `compare`."""

from __future__ import annotations

import pytest

from adamerging.cli.compare import names_of
from adamerging.errors import UsageError

LABELS = ["AdaMerging", "AdaMerging, row-wise", "AdaMerging, row-wise, filtered"]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, []),
        (["ties,dare", " tsv_m "], ["ties", "dare", "tsv_m"]),
        (["ties,AdaMerging, row-wise,dare"], ["ties", "AdaMerging, row-wise", "dare"]),
        (["AdaMerging,row-wise,filtered"], ["AdaMerging, row-wise, filtered"]),
        (["AdaMerging,dare"], ["AdaMerging", "dare"]),
    ],
)
def test_a_label_may_hold_commas(given: list[str] | None, names: list[str]) -> None:
    assert names_of(given, LABELS) == names


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(UsageError, match="--methods takes names"):
        names_of(["ties,,dare"], LABELS)
