"""`adamerging share`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import finetuning, flags, show
from .failing import guard

if TYPE_CHECKING:
    from ..sharing.run import ShareResult, Trial
    from ..sharing.settings import ShareRecipe


@guard()
def share(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; see docs/sharing.md.")],
    tasks: finetuning.Tasks = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder of the store.")
    ] = None,
    penalty: Annotated[
        str | None,
        typer.Option(
            "--penalty", metavar="L[,L...]", help="Price of a layer of a task's own; several are a sweep."
        ),
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option(
            "--overwrite/--no-overwrite",
            help="Train tasks again that were made otherwise.",
            show_default=False,
        ),
    ] = None,
    jobs: finetuning.Jobs = None,
    threads: flags.Threads = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...")
    ] = None,
    dry_run: finetuning.DryRun = False,
    as_json: flags.AsJson = False,
) -> None:
    """Train tasks over one base, each with the few layers of its own that it needs (TAPS).

    Tasks that an earlier run has trained are kept, so that an interrupted run goes on where it stopped.

    Example: adamerging share share.yaml --penalty 0.3,1,3 --out shared/
    """
    from ..sharing.settings import load_share_recipe

    changes = flags.given(out=out, overwrite=overwrite, jobs=jobs, threads=threads, device=device)
    loaded = load_share_recipe(recipe, changes, finetuning.names_of(tasks))
    if penalty is not None:
        loaded = _with_penalties(loaded, penalty)
    print_result(run(loaded, dry_run=dry_run), dry_run=dry_run, as_json=as_json)


def run(recipe: ShareRecipe, *, dry_run: bool = False) -> ShareResult:
    """Run a recipe with progress on standard error."""
    from ..sharing.run import share as share_all

    with finetuning.progress() as (say, on_step):
        return share_all(recipe, dry_run=dry_run, say=say, on_step=on_step)


def print_result(result: ShareResult, *, dry_run: bool, as_json: bool) -> None:
    """What became of each task, and the frontier, as tables or as JSON."""
    if as_json:
        show.print_json({"dry_run": dry_run, "out": str(result.out), **result.record()})
        return
    console = show.console()
    columns = ["task", "", ">penalty", ">val, %", ">test, %", ">open layers", ">parameters", ">time", ""]
    rows = [_row(trial, result) for trial in result.trials]
    console.print(show.table("Tasks", columns, rows))
    if dry_run:
        console.print("\nNothing was written.")
        return
    points = [
        (
            "chosen" if point.penalty is None else f"{point.penalty:g}",
            finetuning.percent(point.val_accuracy),
            finetuning.percent(point.test_accuracy),
            finetuning.percent(point.open_share),
            f"{point.multiple:.2f}",
        )
        for point in result.frontier
    ]
    heads = [">penalty", ">val, %", ">test, %", ">open layers, %", ">parameters, × the base"]
    console.print()
    console.print(show.table("Accuracy against parameters", heads, points))
    console.print(f"\nThe store is {result.out}.")


def _row(trial: Trial, result: ShareResult) -> tuple[str, ...]:
    figures, record = trial.figures, trial.record
    return (
        trial.task,
        trial.status,
        f"{trial.penalty:g}",
        *(finetuning.percent(record.get(key)) for key in ("val_accuracy", "test_accuracy")),
        f"{figures['open']} of {figures['layers']}" if figures else "",
        show.count(trial.parameters) if figures else "",
        show.duration(record["seconds"]) if "seconds" in record else "",
        "stored" if trial in result.chosen.values() else "",
    )


def _with_penalties(recipe: ShareRecipe, given: str) -> ShareRecipe:
    """The recipe with the penalties of ``--penalty``."""
    from ..errors import UsageError
    from ..sharing.settings import SweepSettings, TapsSettings
    from ..validation import make

    try:
        values = [float(text) for text in given.split(",")]
    except ValueError:
        raise UsageError(f"--penalty takes numbers such as 1 or 0.3,1,3, got {given!r}") from None
    changes: dict[str, Any] = {"sweep": None}
    if len(values) == 1:
        gates = {**recipe.gates.model_dump(exclude_unset=True), "penalty": values[0]}
        changes["gates"] = make(TapsSettings, gates, "--penalty")
    else:
        sweep = {} if recipe.sweep is None else recipe.sweep.model_dump(exclude_unset=True)
        changes["sweep"] = make(SweepSettings, {**sweep, "penalty": values}, "--penalty")
    return recipe.model_copy(update=changes)
