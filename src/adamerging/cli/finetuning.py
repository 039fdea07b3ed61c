"""`adamerging finetune`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import flags, show
from .failing import guard

if TYPE_CHECKING:
    from ..finetuning.run import Outcome
    from ..finetuning.settings import FinetuneRecipe

Tasks = Annotated[str | None, typer.Option("--tasks", metavar="A,B", help="Only these tasks of the recipe.")]
Jobs = Annotated[
    int | None, typer.Option("--jobs", min=1, help="Trainings at the same time; one unless told.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Read and check everything, say what would be trained.")
]


@guard()
def finetune(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; see docs/finetuning.md.")],
    tasks: Tasks = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder of the experts.")
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option(
            "--overwrite/--no-overwrite",
            help="Train experts again that were made otherwise.",
            show_default=False,
        ),
    ] = None,
    jobs: Jobs = None,
    threads: flags.Threads = None,
    device: Annotated[
        str | None, typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ...")
    ] = None,
    dry_run: DryRun = False,
    as_json: flags.AsJson = False,
) -> None:
    """Fine-tune an expert for each task of a recipe, from one base.

    Experts that an earlier run has made are kept, so that an interrupted run goes on where it stopped.

    Example: adamerging finetune finetune.yaml --out experts/
    """
    from ..finetuning.settings import load_finetune_recipe

    changes = flags.given(out=out, overwrite=overwrite, jobs=jobs, threads=threads, device=device)
    loaded = load_finetune_recipe(recipe, changes, names_of(tasks))
    print_outcomes(run(loaded, dry_run=dry_run), dry_run=dry_run, as_json=as_json)


def names_of(tasks: str | None) -> list[str] | None:
    """The names in ``a,b``."""
    return None if tasks is None else [name.strip() for name in tasks.split(",") if name.strip()]


def run(recipe: FinetuneRecipe, *, dry_run: bool = False) -> list[Outcome]:
    """Run a recipe with progress on standard error."""
    from ..finetuning.run import finetune as finetune_all

    with progress() as (say, on_step):
        return finetune_all(recipe, dry_run=dry_run, say=say, on_step=on_step)


def print_outcomes(outcomes: Sequence[Outcome], *, dry_run: bool, as_json: bool) -> None:
    """What became of each expert, as a table or as JSON."""
    if as_json:
        show.print_json({"dry_run": dry_run, "experts": [plain(outcome) for outcome in outcomes]})
        return
    rows = []
    for outcome in outcomes:
        record = outcome.record
        scores = [percent(record.get(key)) for key in ("val_accuracy", "test_accuracy")]
        seconds = show.duration(record["seconds"]) if "seconds" in record else ""
        rows.append((outcome.name, outcome.status, *scores, seconds, outcome.out))
    console = show.console()
    columns = ["task", "", ">val, %", ">test, %", ">time", "folder"]
    console.print(show.table("Experts", columns, rows))
    if dry_run:
        console.print("\nNothing was written.")


def plain(outcome: Outcome) -> dict[str, Any]:
    """An outcome as plain data."""
    keys = ("val_accuracy", "test_accuracy", "best_epoch", "epochs_run", "seconds", "key", "settings")
    found = {key: outcome.record[key] for key in keys if key in outcome.record}
    return {"task": outcome.name, "status": outcome.status, "out": str(outcome.out), **found}


def percent(share: Any) -> str:
    """A share of one in percent; nothing where there is none."""
    return f"{100 * share:.1f}" if isinstance(share, float) else ""


@contextmanager
def progress() -> Iterator[tuple[Callable[[str, str], None], Callable[[str, int, int], None]]]:
    """Who is told of lines and steps. Raises `InterruptedRun` on Ctrl-C: what is finished is kept."""
    try:
        with _progress() as told:
            yield told
    except KeyboardInterrupt:
        from ..adaptation.loop import InterruptedRun

        raise InterruptedRun(
            "interrupted; trainings that were finished are kept, and the same command goes on with the others"
        ) from None


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str, str], None], Callable[[str, int, int], None]]]:
    """A bar for the task in training where standard error is a terminal; else a line an evaluation."""
    console = show.console(stderr=True)
    if not console.is_terminal:
        yield (lambda task, line: console.print(f"{task}: {line}", soft_wrap=True)), lambda *_: None
        return
    from rich import progress as bars

    columns: list[bars.ProgressColumn] = [
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=24),
        bars.TaskProgressColumn(),
        bars.TimeRemainingColumn(compact=True),
    ]
    with bars.Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task("reading data", total=None)

        def on_step(task: str, step: int, total: int) -> None:
            bar.update(line, description=f"training {task}", completed=step, total=total)

        yield (lambda task, text: bar.console.print(f"{task}: {text}", soft_wrap=True)), on_step
