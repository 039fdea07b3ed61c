"""`adamerging store`: look at a store of tasks over one base, add to it, take out of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from . import flags, show
from .failing import guard

if TYPE_CHECKING:
    from ..sharing.layer_map import LayerMap

store = typer.Typer(
    name="store",
    help="Look at a store of tasks over one base, add a task to it, take one out of it.",
    no_args_is_help=True,
)
Folder = Annotated[Path, typer.Argument(metavar="STORE", help="The folder of a store.")]


@store.command("show")
@guard()
def show_store(
    folder: Folder,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every weight file and compare with the index.")
    ] = False,
    as_json: flags.AsJson = False,
) -> None:
    """Say which task has which layers of its own, and what it all weighs."""
    print_store(folder, verify=verify, as_json=as_json)


def print_store(folder: Path, *, verify: bool = False, as_json: bool = False) -> None:
    """The map and sizes of a store. Raises as `open_store`."""
    from ..sharing.layer_map import layer_map
    from ..weights.shared_store import open_store

    opened = open_store(folder, verify=verify)
    if verify:
        for task in opened.index.tasks:
            opened.open_task(task)
    found = layer_map(opened)
    if as_json:
        show.print_json({"store": str(folder), **found.as_dict(), "record": opened.index.record})
        return
    say_map(found)
    if verify:
        show.note("every weight file is as it was written")


def say_map(found: LayerMap) -> None:
    """Print the map: a row a task, its cells the layers in the network's order, and the sizes."""
    from ..sharing.layer_map import grid

    console = show.console()
    head = max([4, *(len(task) for task in found.tasks)])
    width = max(16, console.width - head - 36)
    lines = grid(found, width)
    rows = []
    for task, line in zip(found.tasks, lines, strict=True):
        own = sum(found.parameters[task].values())
        rows.append((task, line, f"{found.share(task):.0%}", show.count(own), f"{own / found.base:.3f}"))
    columns = ["task", "layers of its own", ">of layers", ">parameters", ">of the base"]
    console.print(show.table("", columns, rows))
    gone = len(found.shared_by_all)
    console.print(
        f"\n{len(found.tasks)} tasks over a base of {show.count(found.base)} parameters: "
        f"{found.multiple:.3f} times one model; "
        f"{gone} of {len(found.layers)} layers are the base's in every task"
    )


@store.command("add")
@guard()
def add(
    folder: Folder,
    expert: Annotated[str, typer.Argument(metavar="NAME=PATH", help="The expert, as for merge.")],
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Keep layers whose relative change is at least this.")
    ] = None,
    keep: Annotated[
        float | None, typer.Option("--keep", metavar="SHARE", help="Keep this share of its layers.")
    ] = None,
) -> None:
    """Add an expert that exists already; the files of the other tasks are not touched.

    Example: adamerging store add store/ trec=experts/trec --keep 0.5
    """
    named = flags.named([expert])
    from ..sharing.compress import add_expert

    ((name, path),) = named.items()
    say_map(add_expert(folder, name, path, **flags.given(threshold=threshold, keep=keep)))


@store.command("remove")
@guard()
def remove(folder: Folder, task: Annotated[str, typer.Argument(help="Which task.")]) -> None:
    """Take a task out of a store; the files of the other tasks are not touched."""
    from ..sharing.store import remove_task

    if not task:
        raise UsageError("name the task to take out")
    remove_task(folder, task)
    show.note(f"{folder} has no task '{task}' any more")
