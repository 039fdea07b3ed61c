"""`adamerging suite`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
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
    baselines = "baselines"
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
            help="finetune the experts, merge them, compare the methods, or all three; or baselines: train "
            "the tasks in other ways; or share: train them over one base.",
        ),
    ] = Stage.all,
    table: Annotated[
        list[str] | None,
        typer.Option(
            "--table",
            metavar="A,B",
            help="Comparisons of the suite to run: main (unless told), others that it has by name, or all.",
        ),
    ] = None,
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
    tables = _tables(filled, table, stage)
    _ensure(loaded, filled, data)
    found: dict[str, Any] = {"suite": name, "out": str(folder), "dry_run": dry_run}
    if not dry_run:
        found["recipes"] = {key: str(path) for key, path in filled.write(folder).items()}
    stages = [Stage.finetune, Stage.merge, Stage.compare] if stage is Stage.all else [stage]
    trains = Stage.finetune in stages or (dry_run and stage not in (Stage.share, Stage.baselines))
    if trains or filled.finetune is None:
        found |= _experts(filled, jobs, threads, overwrite, dry_run, as_json, trains=trains)
    if Stage.baselines in stages:
        found["baselines"] = _baselines(filled, jobs, threads, overwrite, dry_run, as_json)
    if Stage.share in stages:
        found["share"] = _share(filled, jobs, threads, overwrite, dry_run, as_json)
    if Stage.merge in stages and not dry_run:
        found["merge"] = _merge(filled, folder, threads, overwrite, as_json)
    if Stage.compare in stages and dry_run:
        found["tables"] = _listed(filled, tables, folder, as_json)
    elif Stage.compare in stages:
        given: list[tuple[str, Path | str | int | None]] = [
            ("--data", data),
            ("--out", out),
            ("--tasks", tasks),
            ("--threads", threads),
            *(("--set", each) for each in values or []),
        ]
        for one in tables:
            command = _command(name, [("--table", one), *given])
            found[files.comparison(one)] = _compare(folder, files.comparison(one), threads, command, as_json)
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


def _tables(filled: Filled, asked: list[str] | None, stage: Stage) -> list[str]:
    """Names of the comparisons to run, in the suite's order."""
    from ..errors import UsageError
    from ..suites.files import ALL, MAIN

    known = [MAIN, *filled.tables]
    if asked is None:
        return [MAIN]
    if stage not in (Stage.compare, Stage.all):
        raise UsageError(f"--table is for the stage compare, not {stage.value}")
    names = [name for text in asked for name in finetuning.names_of(text) or []]
    unknown = [name for name in names if name not in (*known, ALL)]
    if unknown or not names:
        raise UsageError(
            f"the suite {filled.suite.title} has no table {', '.join(unknown)}; it has {', '.join(known)}, "
            f"and {ALL} stands for these"
        )
    return [name for name in known if name in names or ALL in names]


def _listed(filled: Filled, tables: Sequence[str], folder: Path, as_json: bool) -> list[dict[str, Any]]:
    """What each comparison would do; the recipes are checked."""
    from ..evaluation.settings import CompareSettings
    from ..suites.files import MAIN, comparison
    from ..validation import make

    found = []
    for name in tables:
        about = "the suite's own comparison" if name == MAIN else filled.suite.tables[name].about
        fields = filled.recipes[comparison(name)]["compare"]
        settings = make(CompareSettings, fields, f"suite {filled.suite.title}, table {name}")
        found.append(
            {"name": name, "about": about, "methods": len(settings.methods), "seeds": settings.seeds,
             "limit": settings.limit, "out": str(folder / comparison(name))}
        )  # fmt: skip
    if not as_json:
        rows = [
            (each["name"], each["about"], each["methods"], each["limit"] or "all", each["out"])
            for each in found
        ]
        columns = ["table", "what it is", ">methods", ">samples a task", "folder"]
        show.console().print(show.table("Comparisons", columns, rows))
    return found


def _command(name: str, options: Sequence[tuple[str, Path | str | int | None]]) -> str:
    """What to type to run a comparison again; options without a value were not given."""
    words = ["adamerging", "suite", name, "--stage", "compare"]
    for option, value in options:
        words += [] if value is None else [option, str(value)]
    return shlex.join(words)


def _experts(
    filled: Filled, jobs: int | None, threads: int | None, overwrite: bool, dry_run: bool, as_json: bool,
    *, trains: bool,
) -> dict[str, Any]:  # fmt: skip
    """The experts: trained, or given."""
    if filled.finetune is None:
        given = filled.merge["experts"]
        if trains:
            show.note(f"{filled.suite.title}: nothing to train, its experts are there: {', '.join(given)}")
        return {
            "experts": [{"name": task, "status": "given", "folder": path} for task, path in given.items()]
        }
    outcomes = _trained(filled.finetune, filled, jobs, threads, overwrite, dry_run)
    if not as_json:
        finetuning.print_outcomes(outcomes, dry_run=dry_run, as_json=False)
    weak = _below(outcomes, filled.suite.floors)
    return {"experts": [finetuning.plain(outcome) for outcome in outcomes], "below_floor": weak}


def _trained(
    fields: Mapping[str, Any], filled: Filled, jobs: int | None, threads: int | None, overwrite: bool,
    dry_run: bool,
) -> list[Outcome]:  # fmt: skip
    from ..finetuning.settings import FinetuneRecipe
    from ..validation import make

    changes = flags.given(jobs=jobs, threads=threads, overwrite=overwrite or None)
    recipe = make(FinetuneRecipe, {**fields, **changes}, f"suite {filled.suite.title}")
    return finetuning.run(recipe, dry_run=dry_run)


def _baselines(
    filled: Filled, jobs: int | None, threads: int | None, overwrite: bool, dry_run: bool, as_json: bool
) -> dict[str, Any]:
    """The tasks trained in other ways, to set beside the experts."""
    from ..errors import UsageError

    if not filled.baselines:
        raise UsageError(f"the suite {filled.suite.title} has no stage baselines")
    found = {}
    for name, fields in filled.baselines.items():
        about = filled.suite.baselines[name].about
        show.note(f"{name}: {about}")
        outcomes = _trained(fields, filled, jobs, threads, overwrite, dry_run)
        found[name] = {"about": about, "experts": [finetuning.plain(outcome) for outcome in outcomes]}
        if not as_json:
            finetuning.print_outcomes(outcomes, dry_run=dry_run, as_json=False)
    return found


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


def _compare(folder: Path, name: str, threads: int | None, command: str, as_json: bool) -> dict[str, Any]:
    """One comparison, by the recipe of its name, into a folder of its own, and its report."""
    from ..evaluation.compare import compare
    from ..recipe import load_recipe
    from .compare import draw_report, progress, whereabouts

    out = folder / name
    recipe = load_recipe(folder / f"{name}.yaml", flags.given(threads=threads))
    with progress() as say:
        found = compare(
            recipe, out=out, say=say, on_plan=lambda plan: show.note(f"{out}: {plan}"), command=command
        )
        page = draw_report(out, say)
    if not as_json:
        show.console().print(f"\nCompared {len(found.rows)} models.")
        show.note(whereabouts(out, page))
    return {
        "out": str(out), "report": None if page is None else str(page), "rows": len(found.rows),
        "complete": found.complete,
    }  # fmt: skip
