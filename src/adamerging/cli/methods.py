"""`adamerging methods`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from . import flags, show
from .failing import guard


@guard()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="One method, with all that its options do.", show_default=False)
    ] = None,
    as_json: flags.AsJson = False,
) -> None:
    """List the methods and their options."""
    from ..catalogue import catalogue, find

    if as_json:
        listings = [find(name)] if name else catalogue().values()
        show.print_json({listing.name: asdict(listing) for listing in listings})
        return
    console = show.console()
    if name is None:
        rows = [
            (m.name, ", ".join(f"{o.name}={as_yaml(o.default)}" for o in m.options), m.summary)
            for m in catalogue().values()
        ]
        console.print(show.table("", ["method", "options", "does"], rows))
        console.print("\nadamerging methods NAME tells what the options of one do.")
        return
    method = find(name)
    console.print(f"{method.name}: {method.summary}")
    for text in (method.details, method.paper):
        if text:
            console.print(f"\n{text}")
    if method.options:
        console.print()
        options = [(o.name, o.values, as_yaml(o.default), o.help) for o in method.options]
        console.print(show.table("", ["option", "takes", "default", "does"], options))


def as_yaml(value: Any) -> str:
    """A default as one would write it in a recipe."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
