"""`adamerging compare`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import flags, show
from .failing import guard

if TYPE_CHECKING:
    from ..evaluation.records import Comparison
    from ..evaluation.settings import Entry
    from ..recipe import Recipe


class Format(str, Enum):
    """Values of `--format`."""

    table = "table"
    csv = "csv"
    markdown = "markdown"
    latex = "latex"


@guard()
def compare(
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE.yaml", help="Base, experts, tasks with data, and what to compare."),
    ],
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            "-m",
            metavar="NAME,NAME",
            help="Methods (adamerging methods lists them) and presets of learning (adamerging, recommended, "
            "adarank, symerge, wemoe, ...), or labels of the recipe's own; instead of all of the recipe's.",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option("--seeds", metavar="0,1,2", help="A learned or random method runs once for each."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FOLDER",
            help="Folder of the records; one that a stopped comparison left is gone on with. "
            "runs/NAME-OF-RECIPE unless told.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Score on the first so many samples of each task.")
    ] = None,
    form: Annotated[
        Format, typer.Option("--format", help="How to print: a table, one CSV line a score, Markdown, LaTeX.")
    ] = Format.table,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Write the records alone, and no report.html beside them.")
    ] = False,
    as_json: flags.AsJson = False,
) -> None:
    """Compare merged models with their base, their experts and the simple average.

    Example: adamerging compare recipe.yaml --methods task_arithmetic,ties,adamerging --out runs/first
    """
    from ..recipe import load_recipe

    loaded = load_recipe(recipe)
    own = described(loaded)
    names = names_of(methods, own)
    chosen = [{name: own[name]} if name in own else name for name in names]
    changes = flags.given(methods=chosen, seeds=numbers_of(seeds), limit=limit)
    from ..evaluation.compare import compare as run

    folder = out if out is not None else Path("runs") / recipe.stem
    given = {"--methods": ",".join(names), "--seeds": seeds, "--limit": limit}
    plain = as_json or form is not Format.table
    with progress() as say:
        found = run(
            loaded, out=folder, say=say, on_plan=None if plain else lambda plan: show.note(str(plan)),
            command=command_of(recipe, folder, given), **changes,
        )  # fmt: skip
        page = None if no_report else draw_report(folder, say)
    _print(found, folder, page, form, as_json)


def command_of(recipe: Path, out: Path, given: Mapping[str, Any]) -> str:
    """What to type to run the comparison again.

    Args:
        recipe: its recipe.
        out: folder of the records.
        given: other options by name; those that are empty were not given.
    """
    words = ["adamerging", "compare", str(recipe)]
    for option, value in given.items():
        words += [option, str(value)] if value else []
    return shlex.join([*words, "--out", str(out)])


def draw_report(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The page that is drawn of a folder's records; None without the drawing library."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return None
    from ..report.write import write_report

    say("drawing the report")
    return write_report(folder).out


def names_of(arguments: list[str] | None, labels: Collection[str] = ()) -> list[str]:
    """Names from one or more comma-separated lists.

    Args:
        arguments: the lists.
        labels: names that may hold commas themselves; the longest that fits is meant.

    Raises:
        UsageError: a name that is empty.
    """
    names = []
    for argument in arguments or []:
        parts = [part.strip() for part in argument.split(",")]
        while parts:
            ends = range(len(parts), 1, -1)
            end = next((end for end in ends if ", ".join(parts[:end]) in labels), 1)
            names.append(", ".join(parts[:end]))
            parts = parts[end:]
    if any(not name for name in names):
        raise UsageError("--methods takes names with commas between them, as ties,dare")
    return names


def described(recipe: Recipe) -> dict[str, Entry | None]:
    """What the recipe itself says of the models that it compares, by label."""
    listed = recipe.compare.methods if recipe.compare is not None else []
    return {label: entry for item in listed if not isinstance(item, str) for label, entry in item.items()}


def numbers_of(text: str | None) -> list[int]:
    """Whole numbers from a comma-separated list.

    Raises:
        UsageError: anything else in it.
    """
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise UsageError(f"--seeds takes whole numbers with commas between them, as 0,1,2, got '{text}'")
    return [int(part) for part in parts]


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """What is at work, as one line on standard error where that is a terminal."""
    console = show.console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with console.status("") as status:
        yield lambda text: status.update(text)


def _print(found: Comparison, folder: Path, page: Path | None, form: Format, as_json: bool) -> None:
    from ..report.load import Run, shown

    if as_json:
        where = {"out": shown(folder), "report": None if page is None else shown(page)}
        show.print_json({**found.model_dump(mode="json"), **where})
        return
    print_run(Run(found), form)
    if form is not Format.table:
        return
    show.note(whereabouts(folder, page))


def whereabouts(folder: Path, page: Path | None) -> str:
    """Where the records are, and their report or what draws one."""
    from ..report.load import shown

    makes = f"adamerging report {shown(folder)} makes a page of them"
    said = makes if page is None else f"the report is {shown(page)}"
    return f"the records are in {shown(folder)}; {said}"


def print_run(run: Any, form: Format) -> None:
    """A run's records on standard output, in one of the formats."""
    from ..report.long import long_csv
    from ..report.table import FORMATS, cells_of, rich_table

    if form is Format.csv:
        print(long_csv(run), end="")
    elif form is Format.table:
        console = show.console()
        console.print(rich_table(cells_of(run), console.width))
    else:
        print(FORMATS[form.value](cells_of(run)), end="")
