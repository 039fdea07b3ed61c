"""What the command line says of the methods, read from their source, is what the registry says."""

from __future__ import annotations

import subprocess
import sys

import pytest

from adamerging.adaptation.presets import PRESETS
from adamerging.adaptation.settings import AdaptSettings, resolve
from adamerging.catalogue import catalogue, find
from adamerging.errors import UsageError
from adamerging.methods import methods


def test_the_names_are_those_of_the_registry_and_the_presets() -> None:
    assert list(catalogue()) == [*methods(), *PRESETS]
    assert set(methods()).isdisjoint(PRESETS)


@pytest.mark.parametrize("name", methods())
def test_summary_paper_options_and_defaults_are_those_of_the_registry(name: str) -> None:
    listing, known = catalogue()[name], methods()[name]
    assert (listing.summary, listing.paper) == (known.summary, known.paper)
    assert (listing.needs, listing.leaves, listing.cost) == (known.needs, known.leaves, known.cost)
    assert {o.name: o.default for o in listing.options} == {n: d for n, (_, d) in known.options.items()}


@pytest.mark.parametrize("name", methods())
def test_every_option_says_what_it_takes_and_does(name: str) -> None:
    for option in catalogue()[name].options:
        assert option.help
        assert option.values
        assert "[" not in option.values, f"{option.values} is Python, not words"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_tells_what_its_settings_are(name: str) -> None:
    listing, settings = find(name), resolve({"preset": name})
    assert listing.kind == "preset"
    assert listing.summary.endswith(".") and listing.cost
    assert (listing.paper == "") == (name in ("recommended", "thorough"))
    assert {o.name: o.default for o in listing.options} == dict(PRESETS[name].settings)
    assert all(o.help for o in listing.options)
    assert ("task's name" in listing.needs) == (settings.surgery is not None)
    assert (listing.leaves == "one model") == (
        settings.surgery is None and settings.heads == "expert" and settings.route is None
    )
    assert f"{settings.steps or 0:,} steps" in listing.cost or settings.steps == 0


def test_what_presets_cost_is_in_words() -> None:
    costs = {name: find(name).cost for name in ("adarank", "released", "concrete", "prodistill", "surgery")}
    assert costs == {
        "adarank": "10,000 steps",
        "released": "500 steps of 2 batches each",
        "concrete": "2,000 steps of two batches each for the mask, then 1,000 steps",
        "prodistill": "100 epochs of 64 inputs a task, block by block",
        "surgery": "500 steps on stored features",
    }


@pytest.mark.parametrize("name", ["adarank", "concrete", "prodistill", "symerge", "wemoe"])
def test_what_runs_long_has_a_form_within_a_budget(name: str) -> None:
    """Not a tenth of the published steps, and what is learned otherwise is the same."""
    long, short = (resolve({"preset": preset}) for preset in (name, f"{name}_budget"))
    assert work(short) <= (0.21 if name == "prodistill" else 0.13) * work(long)
    for field in ("granularity", "route", "heads", "vectors", "gated", "initial"):
        assert getattr(long, field) == getattr(short, field)
    assert (long.mask is None) == (short.mask is None)


def work(settings: AdaptSettings) -> int:
    """Forward and backward passes of a batch of every task, or epochs of distillation."""
    if isinstance(settings.start, list):
        return int(settings.start[0]["prodistill"]["epochs"])
    if settings.start == "prodistill":
        return 100
    return settings.steps + (2 * settings.mask.steps if settings.mask is not None else 0)


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
