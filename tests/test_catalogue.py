"""What the command line says of the methods, read from their source, is what the registry says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from adamerging.catalogue import catalogue, find
from adamerging.errors import UsageError
from adamerging.methods import methods


def test_the_names_are_those_of_the_registry() -> None:
    assert list(catalogue()) == list(methods())


@pytest.mark.parametrize("name", methods())
def test_summary_paper_options_and_defaults_are_those_of_the_registry(name: str) -> None:
    listing, known = catalogue()[name], methods()[name]
    assert (listing.summary, listing.paper) == (known.summary, known.paper)
    assert {o.name: o.default for o in listing.options} == {n: d for n, (_, d) in known.options.items()}


@pytest.mark.parametrize("name", methods())
def test_every_option_says_what_it_takes_and_does(name: str) -> None:
    for option in catalogue()[name].options:
        assert option.help
        assert option.values
        assert "[" not in option.values, f"{option.values} is Python, not words"


def test_choices_and_ranges_are_in_words() -> None:
    takes = {o.name: o.values for o in find("ties").options}
    assert takes["density"] == "number 0…1"
    assert takes["scope"] == "model | tensor"
    assert {o.name: o.values for o in find("consensus").options}["agreement"] == "integer ≥ 1"


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown method 'tise', did you mean 'ties'"):
        find("tise")


def test_torch_stays_out() -> None:
    code = "import sys, adamerging.catalogue as c; c.catalogue(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
