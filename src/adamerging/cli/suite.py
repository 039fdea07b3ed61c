"""`adamerging suite`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import finetuning, flags, sharing, show
from .failing import guard

if TYPE_CHECKING:
    from ..finetuning.run import Outcome
    from ..suites.files import Filled, Suite


class Stage(str, Enum):
    """Part of a suite."""

    finetune = "finetune"
    share = "share"
    merge = "merge"
    compare = "compare"
    all = "all"


@guard()
def suite(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Such as text8; without it, the suites are listed.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FOLDER", help="Folder of the data sets.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Results (default: runs/NAME).")
    ] = None,
    stage: Annotated[
        Stage,
        typer.Option(
            "--stage",
            help="finetune the experts, merge them, compare the methods, or all three; or share: train the "
            "tasks over one base.",
        ),
    ] = Stage.all,
    tasks: finetuning.Tasks = None,
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=TEXT", help="Another text for a placeholder of the suite's own, as base."
        ),
    ] = None,
    multitask: Annotated[
        bool,
        typer.Option("--multitask", help="Also train one model on all tasks jointly."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace experts that were made otherwise, and the merge.")
    ] = False,
    jobs: finetuning.Jobs = None,
    threads: flags.Threads = None,
    dry_run: finetuning.DryRun = False,
    as_json: flags.AsJson = False,
) -> None:
    """Run a complete experiment on real data: fine-tune experts, merge them, compare the methods.

    Its recipes are files: they are written to the output folder, and each runs by itself too.

    Example: adamerging suite text8 --data data/
    """
    from ..suites import files

    if name is None:
        _list(files, as_json)
        return
    loaded = files.load_suite(name)
    _check_data(loaded, data)
    folder = out or Path("runs") / name
    filled = files.fill(
        loaded, data=data, out=folder, tasks=finetuning.names_of(tasks), multitask=multitask,
        values=_values(values or []),
    )  # fmt: skip
    _ensure(loaded, filled, data)
    found: dict[str, Any] = {"suite": name, "out": str(folder), "dry_run": dry_run}
    if not dry_run:
        found["recipes"] = {key: str(path) for key, path in filled.write(folder).items()}
    stages = [Stage.finetune, Stage.merge, Stage.compare] if stage is Stage.all else [stage]
    if filled.finetune is None:
        given = filled.merge["experts"]
        found["experts"] = [{"name": task, "status": "given", "folder": path} for task, path in given.items()]
        if Stage.finetune in stages or dry_run:
            show.note(f"{name}: nothing to train, its experts are there: {', '.join(given)}")
    elif Stage.finetune in stages or (dry_run and Stage.share not in stages):
        outcomes = _finetune(filled, jobs, threads, overwrite, dry_run)
        found["experts"] = [finetuning.plain(outcome) for outcome in outcomes]
        if not as_json:
            finetuning.print_outcomes(outcomes, dry_run=dry_run, as_json=False)
        found["below_floor"] = _below(outcomes, loaded.floors)
    if Stage.share in stages:
        found["share"] = _share(filled, jobs, threads, overwrite, dry_run, as_json)
    if Stage.merge in stages and not dry_run:
        found["merge"] = _merge(filled, folder, threads, overwrite, as_json)
    if Stage.compare in stages and not dry_run:
        found["compare"] = _compare(found["recipes"]["compare"], folder, as_json)
    if as_json:
        show.print_json(found)


def _check_data(loaded: Suite, data: Path | None) -> None:
    """Refuse a suite without its data, and data for a suite that has none."""
    from ..errors import UsageError

    seen, title = loaded.data.seen, loaded.title
    tasks = [] if seen is None else [seen.replace("${task}", task) for task in loaded.data.tasks]
    needed = [*tasks, *loaded.data.unseen]
    if data is None and needed:
        raise UsageError(
            f"give the folder of the data sets, --data FOLDER; {title} needs {', '.join(needed)}"
        )
    if data is not None and not needed:
        raise UsageError(
            f"{title} takes its data from the hub, so --data is of no use; give copies with --set images=..."
        )


def _ensure(loaded: Suite, filled: Filled, data: Path | None) -> None:
    """See that what the suite takes from a folder or from the hub is there."""
    from ..suites.data import ensure
    from ..suites.hub import ensure_weights

    if data is not None:
        ensure(data, filled.folders, show.note)
    if loaded.hub:
        ensure_weights(loaded, filled)


def _values(given: Sequence[str]) -> dict[str, str]:
    """``NAME=TEXT`` → text by name."""
    from ..errors import UsageError

    wrong = [each for each in given if not each.partition("=")[0] or "=" not in each]
    if wrong:
        raise UsageError(f"--set takes NAME=TEXT, got {', '.join(map(repr, wrong))}")
    return {each.partition("=")[0]: each.partition("=")[2] for each in given}


def _list(files: Any, as_json: bool) -> None:
    suites = [files.load_suite(name) for name in files.names()]
    if as_json:
        show.print_json([{"name": s.title, "about": s.about, "data": s.data.model_dump()} for s in suites])
        return
    rows = [(suite.title, suite.about) for suite in suites]
    show.console().print(show.table("Suites", ["name", "what it is"], rows))


def _finetune(
    filled: Filled, jobs: int | None, threads: int | None, overwrite: bool, dry_run: bool
) -> list[Outcome]:
    from ..finetuning.settings import FinetuneRecipe
    from ..validation import make

    assert filled.finetune is not None
    changes = flags.given(jobs=jobs, threads=threads, overwrite=overwrite or None)
    recipe = make(FinetuneRecipe, {**filled.finetune, **changes}, f"suite {filled.suite.title}")
    return finetuning.run(recipe, dry_run=dry_run)


def _share(
    filled: Filled, jobs: int | None, threads: int | None, overwrite: bool, dry_run: bool, as_json: bool
) -> dict[str, Any]:
    """The tasks over one base, with as few layers of their own as they need."""
    from ..errors import UsageError
    from ..sharing.settings import ShareRecipe
    from ..validation import make

    if filled.share is None:
        raise UsageError(f"the suite {filled.suite.title} has no stage share")
    changes = flags.given(jobs=jobs, threads=threads, overwrite=overwrite or None)
    recipe = make(ShareRecipe, {**filled.share, **changes}, f"suite {filled.suite.title}")
    result = sharing.run(recipe, dry_run=dry_run)
    if not as_json:
        sharing.print_result(result, dry_run=dry_run, as_json=False)
    return result.record()


def _below(outcomes: Sequence[Outcome], floors: dict[str, float]) -> list[str]:
    """Experts that are too weak for their share to mean much; each is warned of."""
    weak = []
    for outcome in outcomes:
        accuracy = outcome.record.get("test_accuracy")
        floor = floors.get(outcome.name)
        if accuracy is not None and floor is not None and 100 * accuracy < floor:
            show.warn(f"expert {outcome.name}: {100 * accuracy:.1f} % on test, it should reach {floor:g} %")
            weak.append(outcome.name)
    return weak


def _merge(
    filled: Filled, folder: Path, threads: int | None, overwrite: bool, as_json: bool
) -> dict[str, Any]:
    """The merged model; one that is there already is kept."""
    from ..adaptation.adapt import adapt_recipe
    from ..recipe import Recipe
    from ..validation import make

    changes = flags.given(threads=threads, overwrite=overwrite or None)
    recipe = make(Recipe, {**filled.merge, **changes}, f"suite {filled.suite.title}")
    out = Path(str(recipe.out))
    if out.exists() and not overwrite:
        show.note(f"{out} is there already and kept; --overwrite merges again")
        return {"out": str(out), "status": "kept"}
    result = adapt_recipe(recipe)
    if not as_json:
        from .planned import scores_table

        console = show.console()
        console.print(f"\nMerged into {out} in {show.duration(result.record['seconds'])}.\n")
        console.print(scores_table(result.record))
    return {"out": str(out), "status": "merged", "scores": result.record.get("scores")}


def _compare(path: str, folder: Path, as_json: bool) -> dict[str, Any]:
    from ..evaluation.compare import compare  # type: ignore[import-not-found, unused-ignore]
    from ..recipe import load_recipe

    found = compare(load_recipe(path), out=folder / "compare")
    if not as_json:
        show.console().print(f"\nCompared {len(found.rows)} models; records in {folder / 'compare'}.")
    return {"out": str(folder / "compare"), "rows": len(found.rows), "complete": found.complete}
