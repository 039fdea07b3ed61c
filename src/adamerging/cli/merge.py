"""`adamerging merge`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from . import flags, show
from .failing import guard
from .planned import notes_of, scores_table, treatments

if TYPE_CHECKING:
    from ..estimate import Estimate
    from ..recipe import Recipe
    from ..run import MergeResult, Prepared, Progress
    from ..tasks.task import Task
    from ..weights.fingerprint import Fingerprints

_HOW = "How"
_OUTPUT = "Output"


@guard()
def merge(
    sources: flags.Sources = None,
    base: flags.Base = None,
    expert: flags.Experts = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            metavar="NAME",
            help="The method (adamerging methods lists them; task_arithmetic unless told). Repeated, the "
            "methods run one after the other; one with options is written 'dare: {density: 0.3}'.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help="An option of the method (of the last one of a chain), as density=0.2; may be repeated.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            "--scale",
            metavar="VALUE",
            help="λ that the merged task vector is multiplied with: 0.3, or over depth [0.1, 0.5].",
            rich_help_panel=_HOW,
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            metavar="[NAME=]VALUE",
            help="Weight of one expert, as sst2=0.5, or of all; may be repeated.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    allow: Annotated[
        list[flags.Allow] | None,
        typer.Option(
            "--allow",
            metavar="unrelated|nonfinite",
            help="Go on although weights do not look fine-tuned from this base, or hold NaN or infinity.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    include: flags.Include = None,
    exclude: flags.Exclude = None,
    heads: flags.Heads = None,
    no_heads: flags.NoHeads = False,
    buffers: flags.BuffersFlag = None,
    vocabulary: flags.VocabularyFlag = None,
    adapt: Annotated[
        list[str] | None,
        typer.Option(
            "--adapt",
            metavar="PRESET|KEY=VALUE",
            help="Learn the coefficients on the data: a preset (recommended, paper, adarank, symerge, wemoe, "
            "...) or a setting, as steps=200; may be repeated.",
            rich_help_panel=flags.DATA,
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="NAME=FILE",
            help="Unlabeled data for one expert; may be repeated.",
            rich_help_panel=flags.DATA,
        ),
    ] = None,
    test: flags.Tests = None,
    task: flags.TaskKeys = None,
    transductive: Annotated[
        bool | None,
        typer.Option(
            "--transductive/--no-transductive",
            help="Allow data to score on that was adapted to; the record says so.",
            show_default=False,
            rich_help_panel=flags.DATA,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out", "-o", metavar="FOLDER", help="Folder to write; must not exist.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    overwrite: Annotated[
        bool | None,
        typer.Option(
            "--overwrite/--no-overwrite",
            help="Replace the output folder of an earlier run.",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    dtype: Annotated[
        flags.Dtype | None,
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="float32, float16, bfloat16 or float64; the base's unless told.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="base|union|EXPERT",
            help="Whose tokenizer the result carries; the base's unless told.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only say what would be merged, and the disk, memory and time it takes.",
        ),
    ] = False,
    as_json: flags.AsJson = False,
    threads: flags.Threads = None,
) -> None:
    """Merge experts into one model, from a recipe or from flags. Flags override the recipe's keys.

    Example: adamerging merge base/ sst2=experts/sst2 trec=experts/trec --method ties --out merged/

    With --adapt the coefficients are learned on unlabeled data, one --data NAME=FILE for each expert.
    """
    changes = flags.given(
        method=flags.method_of(method) if method else None,
        options=flags.pairs(option, "--option") if option else None,
        scale=flags.value_of(scale, "--scale") if scale is not None else None,
        weights=flags.weights_of(weight) if weight else None,
        include=include,
        exclude=exclude,
        heads=heads,
        buffers=buffers,
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        dtype=dtype,
        allow=allow,
        threads=threads,
        out=out,
        overwrite=overwrite,
        adapt=flags.adapt_of(adapt) if adapt else None,
        tasks=flags.tasks_of(data or [], test or [], task or []) or None,
        transductive=transductive,
    )
    if no_heads:
        changes["heads"] = _no_heads(heads)
    recipe = flags.recipe_from(sources or [], base, expert or [], changes)
    if recipe.out is None and not dry_run:
        raise UsageError("no output folder: give --out FOLDER (or out: in the recipe); --dry-run needs none")
    if recipe.adapt is not None:
        from .adapting import learn

        learn(recipe, dry_run=dry_run, as_json=as_json)
        return
    _merge(recipe, dry_run=dry_run, as_json=as_json)


def _no_heads(heads: Sequence[str] | None) -> list[str]:
    if heads:
        raise UsageError("--heads and --no-heads exclude each other")
    return []


def _merge(recipe: Recipe, *, dry_run: bool, as_json: bool) -> None:
    from ..weights.fingerprint import Fingerprints, likely_file

    # Hashing takes a core for about as long as importing torch, which leaves the others idle.
    sources = [] if dry_run else [recipe.base, *(expert.path for expert in recipe.experts.values())]
    with Fingerprints(file for source in sources if (file := likely_file(source))) as prints:
        _merge_hashed(recipe, prints, dry_run=dry_run, as_json=as_json)


def _merge_hashed(recipe: Recipe, prints: Fingerprints, *, dry_run: bool, as_json: bool) -> None:
    from ..run import check_out, execute, prepare_recipe

    prepared = prepare_recipe(recipe)
    if dry_run:
        from ..adaptation.adapt import tasks_of
        from ..estimate import estimate

        tasks = tasks_of(recipe, prepared)
        if recipe.out is not None:
            check_out(prepared, recipe.out, overwrite=recipe.overwrite)
        _show_dry_run(prepared, estimate(prepared, recipe.out), tasks, as_json)
        return
    with _progress(prepared) as (progress, say):
        if recipe.tasks:
            from ..adaptation.adapt import tasks_of
            from ..adaptation.static import merge_with_tasks

            result = merge_with_tasks(
                prepared, tasks_of(recipe, prepared), out=recipe.out, overwrite=recipe.overwrite,
                transductive=recipe.transductive, progress=progress, prints=prints, say=say,
            )  # fmt: skip
        else:
            result = execute(
                prepared, out=recipe.out, overwrite=recipe.overwrite, progress=progress, prints=prints
            )
    _show_result(prepared, result, as_json)


@contextmanager
def _progress(prepared: Prepared) -> Iterator[tuple[Progress | None, Callable[[str], None]]]:
    """A bar on standard error where that is a terminal, and what it says is done; nothing otherwise."""
    console = show.console(stderr=True)
    if not console.is_terminal:
        yield None, lambda _: None
        return
    from rich import progress as bars

    # A value of each task vector is a value of the base and of each expert.
    nbytes = sum(w.nbytes for w in (prepared.vectors.base, *prepared.vectors.experts.values()))
    factor = nbytes * prepared.method.reads / max(1, prepared.reads)
    columns: list[bars.ProgressColumn] = [
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=None),
        bars.TaskProgressColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(compact=True),
    ]
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("merging", total=prepared.reads * factor)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done * factor, description="merging" if done < total else "finishing")

        yield advance, lambda text: bar.update(task, description=text)


def _show_result(prepared: Prepared, result: MergeResult, as_json: bool) -> None:
    from ..methods.decompositions import newly_kept

    record, out = result.record, result.out
    assert out is not None
    nbytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    warnings = [*_warnings(prepared, record["unchanged"]), *record["warnings"]]
    if as_json:
        show.print_json({**record, "out": str(out), "bytes": nbytes, "warnings": warnings})
        return
    console = show.console()
    experts = record["experts"]
    many = f"{len(experts)} experts" if len(experts) > 1 else "1 expert"
    console.print(
        f"Merged {many} into {out} by {record['method']}: {show.size(nbytes)} in "
        f"{show.duration(record['seconds'])}.",
        soft_wrap=True,
    )
    console.print()
    console.print(treatments(prepared.plan))
    if "scores" in record:
        console.print()
        console.print(scores_table(record))
    if record.get("masks"):
        show.note(
            "each task has weights of its own, made when the folder is opened with the task's name; the body "
            "by itself is no multi-task model"
        )
    if record.get("statistics"):
        other = "" if record["recipe"].get("buffers") == "task" else "; --buffers task has a set a task"
        show.note(f"BatchNorm statistics: {record['statistics']}{other}")
    if nbytes := newly_kept():
        show.note(
            f"{show.size(nbytes)} of decompositions are kept for merges of the same experts; "
            "adamerging cache --clear frees them"
        )
    _tell(show.note, notes_of(prepared))
    _tell(show.warn, warnings)


def _show_dry_run(prepared: Prepared, estimate: Estimate, tasks: Sequence[Task], as_json: bool) -> None:
    from dataclasses import asdict

    from ..adaptation.static import estimates_statistics
    from ..adaptation.statistics import without_inputs
    from ..merging import lacking_data
    from ..run import statistics_warning

    warnings = _warnings(prepared, [])
    if prepared.own_statistics or not estimates_statistics(prepared, tasks):
        warnings += statistics_warning(prepared)
    wanted = prepared.method.statistics
    if wanted is not None:
        warnings.append(
            f"{prepared.method.name} first runs each expert on up to {wanted.samples} unlabeled inputs of "
            "its task, which the estimate leaves out"
        )
        if lacking := without_inputs(prepared.vectors, tasks):
            warnings.append(str(lacking_data(prepared.method, lacking)))
    if estimate.free is not None and estimate.free < estimate.disk:
        warnings.append(f"the disk has {show.size(estimate.free)} free, less than the result takes")
    if as_json:
        show.print_json(
            {
                "dry_run": True,
                "method": prepared.method.name,
                "plan": {**prepared.plan.summary(), "notes": list(prepared.plan.notes)},
                "files": {file: list(specs) for file, specs in prepared.files.items()},
                "relatedness": {task: found.cosine for task, found in prepared.relatedness.items()},
                "estimate": asdict(estimate),
                "warnings": warnings,
            }
        )
        return
    console = show.console()
    console.print(
        f"Would merge {', '.join(prepared.vectors.tasks)} by {prepared.method.name}.", soft_wrap=True
    )
    console.print()
    console.print(treatments(prepared.plan))
    console.print()
    free = "" if estimate.free is None else f" ({show.size(estimate.free)} free)"
    rows = [
        ("read", f"{show.size(estimate.read)}, {prepared.method.reads} times"),
        ("write", f"{show.size(estimate.disk)}{free}"),
        ("memory", f"about {show.size(estimate.memory)}, and what the system caches of the files"),
        ("time", f"about {show.duration(estimate.seconds)}"),
    ]
    if prepared.method.reads == 1:
        rows[0] = ("read", show.size(estimate.read))
    console.print(show.table("Estimate, from a sample", ["", ""], rows))
    console.print("\nNothing was written.")
    _tell(show.note, notes_of(prepared))
    _tell(show.warn, warnings)


def _tell(how: Callable[[str], None], messages: Sequence[str]) -> None:
    for message in messages:
        how(message)


def _warnings(prepared: Prepared, unchanged: Sequence[str]) -> list[str]:
    found = [
        f"expert '{task}' does not look fine-tuned from this base: the cosine between their weights is "
        f"{related.cosine:.2f}, of a fine-tuned model about 1"
        for task, related in prepared.relatedness.items()
        if not related.related
    ]
    entries = prepared.vectors.entries()
    if not entries:
        found.append("no tensor is merged: the result is the base")
    elif len(unchanged) == len(entries):
        found.append("no expert changed any merged tensor: the result is the base")
    return found
