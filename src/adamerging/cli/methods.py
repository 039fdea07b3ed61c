"""`adamerging methods`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from . import flags, show
from .failing import guard

if TYPE_CHECKING:
    from ..catalogue import Listing


@guard()
def methods(
    name: Annotated[
        str | None,
        typer.Argument(help="One method or preset, with all that its options do.", show_default=False),
    ] = None,
    as_json: flags.AsJson = False,
) -> None:
    """List the methods and presets: what each does, needs, leaves and costs."""
    from ..catalogue import catalogue, find

    if as_json:
        listings = [find(name)] if name else catalogue().values()
        show.print_json({listing.name: asdict(listing) for listing in listings})
        return
    console = show.console()
    if name is not None:
        _tell(find(name))
        return
    for kind, title in TITLES.items():
        listed = [listing for listing in catalogue().values() if listing.kind == kind]
        rows = [(m.name, Text.assemble(m.summary, "\n", (_facts(m), "dim"))) for m in listed]
        console.print(show.table(title, ["", ""], rows))
        console.print()
    console.print("A pass reads base and experts once; a step takes a batch of every task.")
    console.print("adamerging methods NAME tells what the options of one do.")


TITLES = {
    "method": "Methods (merge --method NAME, or method: in a recipe)",
    "preset": "Presets of learning (merge --adapt NAME, or adapt: in a recipe)",
}


def _facts(listing: Listing) -> str:
    """What it needs, leaves and costs, in one line."""
    return f"needs {listing.needs} · leaves {listing.leaves} · {listing.cost}"


def _tell(listing: Listing) -> None:
    """All there is to say of one."""
    console = show.console()
    console.print(f"{listing.name}: {listing.summary}")
    for text in (listing.details, listing.paper):
        if text:
            console.print(f"\n{text}")
    console.print()
    facts = [("needs", listing.needs), ("leaves", listing.leaves), ("costs", listing.cost)]
    console.print(show.table("", ["", ""], facts))
    if not listing.options:
        return
    console.print()
    if listing.kind == "preset":
        filled = [(o.name, as_yaml(o.default), o.help) for o in listing.options]
        console.print(show.table("", ["setting", "here", "what it is"], filled))
        return
    options = [(o.name, o.values, as_yaml(o.default), o.help) for o in listing.options]
    console.print(show.table("", ["option", "takes", "default", "does"], options))


def as_yaml(value: Any) -> str:
    """A default as one would write it in a recipe."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
