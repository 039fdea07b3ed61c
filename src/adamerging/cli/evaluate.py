"""`adamerging evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from . import flags, show
from .compare import progress
from .failing import guard

if TYPE_CHECKING:
    from ..evaluation.records import Row


@guard()
def evaluate(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A folder that a merge wrote, a store, an expert's, or any classifier of transformers."
        ),
    ],
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="RECIPE.yaml", help="Take the tasks' labelled data from its tasks."),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="NAME", help="Score this task of the recipe; may be repeated."),
    ] = None,
    test: flags.Tests = None,
    task: flags.TaskKeys = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            "--expert",
            metavar="NAME=PATH",
            help="The expert of a task: it is scored too, and the share of its accuracy is told. May be "
            "repeated.",
            rich_help_panel=flags.DATA,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="PATH", help="The base, where the folder is an adapter or has no tokenizer."
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Score on the first so many samples of each task.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where to compute, as cuda or cpu.")] = "cpu",
    as_json: flags.AsJson = False,
) -> None:
    """Score a folder on labelled data: accuracy, macro-F1, calibration, likelihood.

    Example: adamerging evaluate merged/ --test sst2=sst2_test.jsonl --test trec=trec_test.jsonl
    """
    from ..evaluation.folder import evaluate as run

    specs, own_base = _tasks(folder, recipe, only or [], flags.tasks_of([], test or [], task or []))
    with progress() as say:
        row = run(
            folder, specs, base=base or own_base, experts=flags.named(expert or []), limit=limit,
            device=device, say=say,
        )  # fmt: skip
    if as_json:
        show.print_json(row.model_dump(mode="json"))
        return
    console = show.console()
    console.print(_tables(row, console.width))
    if row.settings.get("experts"):
        sources = dict.fromkeys(known["from"] for known in row.settings["experts"].values())
        show.note(f"of expert: the share of the experts' accuracy, as found for {', '.join(sources)}")


def _tasks(
    folder: Path, recipe: Path | None, only: list[str], given: dict[str, Any]
) -> tuple[dict[str, Any], str | None]:
    """The tasks to score, and the base that the recipe names."""
    if recipe is None:
        if only:
            raise UsageError("--only chooses among the tasks of a recipe; give --recipe")
        if not given:
            raise UsageError("no labelled data: give --test NAME=FILE, or --recipe RECIPE.yaml")
        return given, None
    from ..evaluation.folder import tasks_of
    from ..recipe import load_recipe

    loaded = load_recipe(recipe, {"tasks": given} if given else {})
    specs = {name: spec for name, spec in loaded.tasks.items() if spec.evaluate is not None}
    lacking = [name for name in only if name not in specs]
    if lacking:
        raise UsageError(
            f"{recipe} has no labelled data for {', '.join(map(repr, lacking))}; it has it for "
            f"{', '.join(specs) or 'no task'}"
        )
    if only or tasks_of(folder) is not None:
        return {name: spec for name, spec in specs.items() if not only or name in only}, loaded.base
    path = folder.resolve()
    own = [n for n in specs if n in loaded.experts and Path(loaded.experts[n].path).resolve() == path]
    if not own and len(specs) > 1:
        raise UsageError(
            f"{folder} is one model with one head: say which task it is for, --only NAME, one of "
            f"{', '.join(specs)}"
        )
    return {name: specs[name] for name in own or specs}, loaded.base


def _tables(row: Row, width: int) -> Any:
    """The scores for a terminal: as many columns beside the task as fit, the rest below."""
    from rich.cells import cell_len
    from rich.console import Group

    from ..report.table import in_parts

    columns, rows = _cells(row)
    lines = [[name.removeprefix(">") for name in columns], *rows]
    task, *others = (max(cell_len(str(cell)) for cell in column) for column in zip(*lines, strict=True))
    parts = in_parts([each + 2 for each in others], width - min(task, width // 2))
    tables: list[Any] = []
    for part in parts:
        chosen = [0, *(number + 1 for number in part)]
        cut = [[cells[number] for number in chosen] for cells in rows]
        tables += [*([""] if tables else []), show.table("", [columns[number] for number in chosen], cut)]
    return Group(*tables)


def _cells(row: Row) -> tuple[list[str], list[tuple[object, ...]]]:
    """Headings, as `show.table` takes them, and a line a task."""
    columns = ["task", ">samples", ">accuracy", ">95 %", ">macro-F1", ">ECE", ">NLL", ">entropy"]
    shares = [score.normalised for score in row.scores]
    told = any(share is not None for share in shares)
    rows: list[tuple[object, ...]] = [
        (
            score.task,
            score.samples,
            f"{score.accuracy:.1%}",
            f"{score.accuracy_low * 100:.1f}–{score.accuracy_high * 100:.1f}",
            f"{score.macro_f1:.3f}",
            f"{score.ece:.3f}",
            f"{score.nll:.3f}",
            f"{score.entropy:.3f}",
            *(["" if score.normalised is None else f"{score.normalised:.1%}"] if told else []),
        )
        for score in row.scores
    ]
    if len(rows) > 1:
        mean = [
            sum(getattr(score, name) for score in row.scores) / len(row.scores)
            for name in ("accuracy", "macro_f1", "ece", "nll", "entropy")
        ]
        known = [share for share in shares if share is not None]
        kept = f"{sum(known) / len(known):.1%}" if len(known) == len(shares) else ""
        others = [f"{value:.3f}" for value in mean[1:]]
        rows.append(("mean", "", f"{mean[0]:.1%}", "", *others, *([kept] if told else [])))
    return [*columns, ">of expert"] if told else columns, rows
