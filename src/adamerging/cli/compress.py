"""`adamerging compress`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import flags, show
from .compare import progress
from .failing import guard
from .store import say_map

if TYPE_CHECKING:
    from ..sharing.compress import Compressed

_RULE = "Which layers are kept"

Threshold = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        metavar="SCORE",
        help="Keep layers whose change is at least this share of the base's norm (with --learn: whose gate "
        "is at least so likely open).",
        rich_help_panel=_RULE,
    ),
]
Keep = Annotated[
    float | None,
    typer.Option(
        "--keep", metavar="SHARE", help="Keep this share of each expert's layers.", rich_help_panel=_RULE
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        "--budget", metavar="TIMES", help="Size of the store in multiples of the base.", rich_help_panel=_RULE
    ),
]
Within = Annotated[
    float | None,
    typer.Option(
        "--within",
        metavar="POINTS",
        help="Keep the fewest layers that lose at most so many points of accuracy on labelled data, given by "
        "--data or by the recipe's adapt.",
        rich_help_panel=_RULE,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Judge by the first so many samples.", rich_help_panel=_RULE),
]
Learn = Annotated[
    bool,
    typer.Option(
        "--learn", help="Learn which layers each task needs, on unlabeled data.", rich_help_panel=_RULE
    ),
]
Gates = Annotated[
    list[str] | None,
    typer.Option(
        "--gates",
        metavar="KEY=VALUE",
        help="A setting of --learn, as penalty=0.05 or steps=400; may be repeated.",
        rich_help_panel=_RULE,
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="NAME=FILE", help="Data of one expert; may be repeated."),
]
TaskKeys = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="NAME.KEY=VALUE", help="Another key of a task, as sst2.max_length=64."),
]


@guard()
def compress(
    sources: flags.Sources = None,
    base: flags.Base = None,
    expert: flags.Experts = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="FOLDER", help="Store to write; it must not exist.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier store.")] = False,
    threshold: Threshold = None,
    keep: Keep = None,
    budget: Budget = None,
    within: Within = None,
    limit: Limit = None,
    learn: Learn = False,
    gates: Gates = None,
    data: Data = None,
    task: TaskKeys = None,
    include: flags.Include = None,
    exclude: flags.Exclude = None,
    heads: flags.Heads = None,
    threads: flags.Threads = None,
    as_json: flags.AsJson = False,
) -> None:
    """Put experts that exist already into a store: one base, and of each expert the layers its task needs.

    Example: adamerging compress base/ sst2=experts/sst2 trec=experts/trec --keep 0.5 --out store/
    """
    chosen = rule(threshold, keep, budget, within, limit, learn, gates or [])
    changes = flags.given(include=include, exclude=exclude, heads=heads, threads=threads)
    tasks = flags.tasks_of(data or [], [], task or [])
    recipe = flags.recipe_from(
        sources or [], base, expert or [], {**changes, **({"tasks": tasks} if tasks else {})}
    )
    if not out:
        raise UsageError("no store was named: give --out FOLDER")

    from ..adaptation.adapt import tasks_of
    from ..evaluation.compare import open_recipe
    from ..output.folder import OutputFolder
    from ..sharing.compress import CompressSettings, compress_prepared
    from ..validation import make
    from ..weights.shared_store import INDEX

    settings = make(CompressSettings, chosen, "compress")
    OutputFolder(out, overwrite=overwrite, record=INDEX)  # refused now rather than after the work
    with progress() as say:
        prepared = open_recipe(recipe)
        needed = settings.within is not None or settings.learn is not None
        ready = tasks_of(recipe, prepared) if needed and recipe.tasks else []
        made = compress_prepared(prepared, ready, settings, out, overwrite=overwrite, say=say)
    _print(made, as_json)


def rule(
    threshold: float | None,
    keep: float | None,
    budget: float | None,
    within: float | None,
    limit: int | None,
    learn: bool,
    gates: Sequence[str],
) -> dict[str, Any]:
    """The flags that choose layers as fields of `CompressSettings`."""
    if gates and not learn:
        raise UsageError("--gates sets how gates are learned; give --learn, too")
    found = flags.given(threshold=threshold, keep=keep, budget=budget, within=within, limit=limit)
    return {**found, **({"learn": flags.pairs(gates, "--gates")} if learn else {})}


def _print(made: Compressed, as_json: bool) -> None:
    record = made.store.index.record
    if as_json:
        show.print_json({"store": str(made.store.folder), **made.map.as_dict(), "record": record})
        return
    say_map(made.map)
    console = show.console()
    if made.found:
        rows = [
            (
                name,
                f"{found.expert:.1%}",
                f"{found.accuracy:.1%}",
                found.samples,
                len(found.layers),
                found.trials,
            )
            for name, found in made.found.items()
        ]
        columns = ["task", ">expert", ">kept", ">samples", ">layers", ">trials"]
        console.print()
        console.print(show.table("Accuracy on the data that chose", columns, rows))
    if made.learned:
        gates = [
            (name, f"{own.agreement:.1%}", f"{own.divergence:.4f}") for name, own in made.learned.items()
        ]
        console.print()
        columns = ["task", ">same class as the expert", ">KL, nats"]
        console.print(show.table("Open gates on held-out data", columns, gates))
    console.print(f"\n{made.store.folder}")
