"""`adamerging merge` with an `adapt` section: coefficients learned on data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from . import show
from .planned import notes_of, scores_table, treatments

if TYPE_CHECKING:
    from ..adaptation.adapt import AdaptResult
    from ..adaptation.settings import AdaptSettings
    from ..recipe import Recipe

MANY = 6
"""More tasks than these are shown as their mean."""


def learn(recipe: Recipe, *, dry_run: bool, as_json: bool) -> None:
    """Run a recipe with an `adapt` section, or only say what it would take."""
    if dry_run:
        _dry_run(recipe, as_json)
        return
    from ..adaptation.adapt import adapt_recipe

    with _progress() as (callback, say):
        result = adapt_recipe(recipe, callback=callback, say=say)
    _show(result, as_json)


@contextmanager
def _progress() -> Iterator[tuple[Callable[[Mapping[str, Any]], None], Callable[[str], None]]]:
    """A line on standard error where that is a terminal: step, loss by task, rate, time left."""
    console = show.console(stderr=True)
    if not console.is_terminal:
        yield (lambda _: None), (lambda _: None)
        return
    from rich import progress as bars

    columns: list[bars.ProgressColumn] = [
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=16),
        bars.TextColumn("{task.completed:.0f}/{task.total}"),
        bars.TextColumn("{task.fields[loss]}"),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(compact=True),
    ]
    with bars.Progress(*columns, console=console, transient=True) as bar:
        line = bar.add_task("preparing", total=None, loss="", rate="")

        def callback(record: Mapping[str, Any]) -> None:
            if "loss" not in record:
                return
            bar.update(
                line,
                description="learning",
                total=record["steps"],
                completed=record["step"] + 1,
                loss=f"{record['objective']} {losses(record['loss'])}",
                rate=f"{1 / max(record['seconds'], 1e-9):.2g} steps/s",
            )

        yield callback, lambda text: bar.console.print(text, soft_wrap=True)


def losses(by_task: Mapping[str, float]) -> str:
    """The loss of each task; of many tasks the mean."""
    if len(by_task) > MANY:
        return f"{sum(by_task.values()) / len(by_task):.3f}"
    return " ".join(f"{task} {value:.3f}" for task, value in by_task.items())


def _show(result: AdaptResult, as_json: bool) -> None:
    record, out = result.record, result.out
    assert out is not None
    nbytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if as_json:
        show.print_json({**record, "out": str(out), "bytes": nbytes})
        return
    console = show.console()
    many = f"{len(record['experts'])} expert{'s' if len(record['experts']) > 1 else ''}"
    said = "".join(f", {name}" for name in ("labelled", "transductive") if record[name])
    console.print(
        f"Learned {what_of(record)} for {many} by {_by(record)}{said}, and merged "
        f"into {out}: {show.size(nbytes)} in {show.duration(record['seconds'])}.",
        soft_wrap=True,
    )
    if record["start"] is not None and record["end"] is not None:
        console.print()
        console.print(_checks(record))
    if "kept_components" in record:
        console.print()
        console.print(_components(record))
    if "scores" in record:
        console.print()
        console.print(scores_table(record))
    for text in result.warnings:
        show.warn(text)


def what_of(record: Mapping[str, Any]) -> str:
    """What was learned, in words."""
    routing = record.get("routing")
    if routing is not None:
        return (
            f"the {routing['what']} ({record['coefficients']:,} numbers; the model routes "
            f"by input and has {routing['parameters']['times']:.1f} times the parameters of one)"
        )
    parts, mask = record.get("parts", {}), record.get("mask", {}).get("logits", 0)
    own, gates = parts.get("parameters", 0), record.get("gates", 0)
    if not record["adapt"]["steps"]:
        gates = 0
    count = (record["parameters"] or record["coefficients"]) - own - mask - gates
    counts = {
        "coefficients": count,
        "gates of singular components": gates,
        "values of a mask": mask,
        "values of heads" if parts.get("kind") == "heads" else "values of modules before the heads": own,
    }
    return " and ".join(f"{number} {what}" for what, number in counts.items() if number) or "0 coefficients"


def _by(record: Mapping[str, Any]) -> str:
    """What it was learned from, in words."""
    if record.get("routing", {}).get("domains") is not None:
        return "whose task an input is of"
    found: str = record["adapt"]["objective"] if record["adapt"]["steps"] else record["method"]
    return found


def _components(record: Mapping[str, Any]) -> Any:
    """How many singular components of each row are kept, by block."""
    labels = record["stack"]
    rows = [
        (block, *(f"{kept[label][0]} of {kept[label][1]}" if label in kept else "" for label in labels))
        for block, kept in record["kept_components"].items()
    ]
    return show.table("Singular components kept", ["block", *(f">{label}" for label in labels)], rows)


def _checks(record: Mapping[str, Any]) -> Any:
    """Entropy and agreement with the expert of each task, at the start and in the state that was kept."""
    start, end = record["start"], record["end"]
    title = f"Without labels: at the start, and after step {end['step']}"
    if all("held_out_loss" in first for first in start["check"].values()):  # outputs that are no classes
        losses = [
            (task, f"{first['held_out_loss']:.4g}", f"{end['check'][task]['held_out_loss']:.4g}")
            for task, first in start["check"].items()
        ]
        return show.table(title, ["task", f">{record['adapt']['objective']}", ">then"], losses)
    rows = [
        (
            task,
            f"{first['entropy']:.3f}",
            f"{end['check'][task]['entropy']:.3f}",
            *(f"{check['agreement']:.1%}" for check in (first, end["check"][task]) if "agreement" in check),
        )
        for task, first in start["check"].items()
    ]
    columns = ["task", ">entropy", ">then"]
    if rows and len(rows[0]) == 5:
        columns += [">agrees with expert", ">then"]
    return show.table(title, columns, rows)


def _kind(settings: AdaptSettings) -> str:
    if settings.route is not None:
        return f"routers ({settings.route})"
    if settings.granularity == "singular":
        return "coefficients and gates of singular components"
    if settings.granularity == "value":
        return "a change of every value"
    return f"{settings.granularity}-wise coefficients"


def _would(settings: AdaptSettings, named: str, steps: int) -> Iterator[str]:
    """What a run would do, a sentence for each thing that it learns."""
    from ..adaptation.layerwise_settings import asked_for

    options = asked_for(settings.start)
    if options is not None:
        yield (
            f"Would distil {named} block by block, in {options.epochs} epochs of {options.samples} inputs of "
            "each at most."
        )
    if settings.mask is not None and settings.mask.steps:
        yield f"Would learn a mask over the task vectors of {named}, in {settings.mask.steps} steps."
    if steps or (options is None and settings.surgery is None):
        heads = " and heads" if settings.heads == "learned" else ""
        yield f"Would learn {_kind(settings)}{heads} for {named} by {settings.objective}, in {steps} steps."
    if settings.surgery is not None:
        yield (
            f"Would learn a module of rank {settings.surgery.rank} before the head of each of {named}, in "
            f"{settings.surgery.steps} iterations."
        )


def _dry_run(recipe: Recipe, as_json: bool) -> None:
    from ..adaptation.adapt import tasks_of
    from ..adaptation.estimate import estimate_adaptation
    from ..adaptation.settings import resolve
    from ..run import check_out, prepare_recipe

    assert recipe.adapt is not None
    settings = resolve(recipe.adapt.model_dump(exclude_unset=True))
    prepared = prepare_recipe(recipe)
    if recipe.out is not None:
        check_out(prepared, recipe.out, overwrite=recipe.overwrite)
    found = estimate_adaptation(prepared, tasks_of(recipe, prepared), settings)
    if as_json:
        plan = {**prepared.plan.summary(), "notes": list(prepared.plan.notes)}
        show.print_json(
            {"dry_run": True, "adapt": settings.model_dump(), "plan": plan, "estimate": asdict(found)}
        )
        return
    console = show.console()
    named = ", ".join(prepared.vectors.tasks)
    for text in _would(settings, named, found.steps):
        console.print(text, soft_wrap=True)
    console.print()
    console.print(treatments(prepared.plan))
    console.print()
    samples = [(task, train, held) for task, (train, held) in found.samples.items()]
    console.print(show.table("Samples", ["task", ">learned from", ">held out"], samples))
    console.print()
    batches = "a batch of every task at once" if found.joint else "one batch"
    cached = f"{show.size(found.cached)} in {found.cache}" if found.cached else "experts' predictions only"
    rows = [
        ("coefficients" if settings.route is None else "routers", f"{found.coefficients:,} at most"),
        ("disk cache", cached),
        ("memory", f"about {show.size(found.memory)}, and the activations of {batches}"),
        ("write", show.size(found.disk)),
    ]
    console.print(show.table("Estimate", ["", ""], rows))
    console.print("\nNothing was written.")
    for text in notes_of(prepared):
        show.note(text)
