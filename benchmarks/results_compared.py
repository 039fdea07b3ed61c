"""The records of one comparison → Markdown: the models, their tasks, and whatever else was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adamerging.evaluation.making import PER_TASK
from adamerging.evaluation.records import CLEAN
from adamerging.report.aggregate import mean_accuracy, scores_of, seed_groups, split_condition, spread
from adamerging.report.lines import Line, lines_of, unseen_tasks
from adamerging.report.load import Run, load_run
from adamerging.report.table import Cells, cells_of, markdown
from adamerging.units import count, size

CURVES = ("recommended", "thorough", "distilled", "AdaMerging", "AdaMerging, agreement", "paper", "paper++")
"""Rows whose way to the result is shown."""
POINTS = 12
"""Steps that are shown of it, at most."""
FEW = {
    "base": "the base",
    "average": "the average of the experts",
    "AdaMerging": "AdaMerging",
    "recommended": "`recommended`",
    "multi-task": "a model trained on all tasks with their labels",
}
"""Rows that the sentence in front is about, and how it calls them."""


def compared(folder: Path, command: str) -> list[str]:
    """All that a comparison's folder has to show, as paragraphs and tables of Markdown.

    Args:
        folder: with `comparison.json`.
        command: what makes the records.
    """
    run = load_run(folder)
    parts = [
        facts(run, command),
        short(run),
        models(run),
        tasks(run),
        *(["Corrupted inputs, mean over the corrupted tasks:", shift(run)] if conditions(run) else []),
        *splits(run),
        *curves(run),
    ]
    return [part for part in parts if part]


def facts(run: Run, command: str) -> str:
    """What a reader must know of a comparison before its numbers."""
    about = run.comparison
    seen = [task for task in about.tasks if not task.unseen]
    limit, seeds = about.settings.get("limit"), about.settings.get("seeds") or [0]
    scored = {s.task: s.samples for row in run.rows for s in scores_of(row)}
    samples = f"the first {limit} test samples of each task" if limit else "the whole test sets"
    transductive = (about.settings.get("recipe") or {}).get("transductive")
    learned = (
        "**Transductive**: what is learned is learned on the unlabeled inputs that are scored."
        if transductive
        else "Inductive: what is learned is learned on inputs that share none with those that are scored."
    )
    precision = f", scored in {about.settings['precision']}" if "precision" in about.settings else ""
    missing = [f"**Unfinished: {run.missing} of {about.planned} rows are missing.**"] if run.missing else []
    versions = ", ".join(f"{name} {version}" for name, version in about.versions.items())
    return " ".join(
        [
            f"`{command}`: {len(about.experts)} experts on {samples} ({sum(scored.values())} samples of "
            f"{len(seen)} tasks), {_seeds(seeds)}{precision}. {learned}",
            *missing,
            f"{versions or f'adamerging {about.adamerging}'}.",
        ]
    )


def short(run: Run) -> str:
    """What a reader takes along who reads no table; nothing where too little is there."""
    lines = lines_of(run)
    kept = {line.label: found.mean for line in lines if (found := line.kept()) is not None}
    said = [f"{name} {_percent(kept[label])} %" for label, name in FEW.items() if label in kept]
    # Of one model, made without any labels: those with masks have one for each task.
    static = [line.label for line in lines if line.kind == "static" and not line.marks and _single(line)]
    ranked = sorted((label for label in static if label in kept), key=lambda label: -kept[label])
    if ranked:
        said.append(f"the best that learns nothing, {ranked[0]}, {_percent(kept[ranked[0]])} %")
    return (
        f"In short, the share of the experts' accuracy that is kept: {'; '.join(said)}." if said[1:] else ""
    )


def _single(line: Line) -> bool:
    """Whether a line is one model for all tasks."""
    return not any(PER_TASK in row.warnings for row in line.rows)


def models(run: Run) -> str:
    """The models: how good, and what each took; the notes below."""
    cells, lines = cells_of(run), lines_of(run)
    if not lines:
        return "\n".join(f"- {note}" for note in cells.notes)
    outside = unseen_tasks(run)
    more = {
        "unseen": [_percent(_mean(line, outside, unseen=True)) for line in lines] if outside else [],
        "memory": [_first(line, "memory", size) for line in lines],
        "learned numbers": [_first(line, "parameters", count) for line in lines],
    }
    more = {name: column for name, column in more.items() if any(column)}
    rows = [
        [*row[: cells.fixed], *(column[number] for column in more.values())]
        for number, row in enumerate(cells.rows)
    ]
    return grid([*cells.columns[: cells.fixed], *more], rows, cells.notes)


def tasks(run: Run) -> str:
    """The same models, task by task."""
    cells = cells_of(run)
    rows = [[row[0], *row[cells.fixed :]] for row in cells.rows]
    return grid(["by task", *cells.columns[cells.fixed :]], rows) if rows else ""


def conditions(run: Run) -> list[str]:
    """The corruptions that were scored, each with its severity."""
    found = {score.condition for row in run.rows for score in row.scores}
    return sorted(found - {CLEAN}, key=split_condition)


def shift(run: Run) -> str:
    """Models under every corruption, clean inputs of the same tasks beside them."""
    columns = conditions(run)
    severities = {split_condition(name)[1] for name in columns}
    shown = [split_condition(name)[0] if len(severities) == 1 else name for name in columns]
    rows = []
    for line in lines_of(run):
        hit = {s.task for row in line.rows for s in row.scores if s.condition != CLEAN}
        cells = [_mean(line, sorted(hit), condition=name) for name in columns]
        known = [cell for cell in cells if cell is not None]
        mean = sum(known) / len(known) if known and len(known) == len(cells) else None
        clean = _mean(line, sorted(hit))
        if known:
            rows.append([line.label, *map(_percent, (clean, mean, *cells))])
    severity = f"Severity {severities.pop()} of 5." if len(severities) == 1 else ""
    return grid(["model", "clean", "mean of corrupted", *shown], rows, [severity] if severity else [])


def splits(run: Run) -> list[str]:
    """For each set of tasks that was left out: the models of the rest, on these and on those left out."""
    parts = []
    for group in dict.fromkeys(row.group for row in run.rows if row.group is not None):
        rows = [row for row in run.rows if row.group == group and row.scores]
        outside = list(dict.fromkeys(s.task for row in rows for s in row.scores if s.unseen))
        cells = []
        for label, seeds in seed_groups(rows).items():
            accuracies = [
                spread(s.accuracy for row in seeds for s in scores_of(row, unseen=True) if s.task == task)
                for task in outside
            ]
            values = [found.mean if found else None for found in accuracies]
            known = [value for value in values if value is not None]
            means = spread(mean_accuracy(row) for row in seeds)
            unseen = sum(known) / len(known) if known else None
            cells.append([label, *map(_percent, (means.mean if means else None, unseen, *values))])
        columns = ["model", "merged tasks", "tasks left out", *outside]
        parts += [f"{group[:1].upper()}{group[1:]}:", grid(columns, cells)] if cells else []
    return parts


def curves(run: Run) -> list[str]:
    """How learned models got better step by step, measured without labels."""
    found = {label: _checks(run, label) for label in CURVES}
    found = {label: (where, checks) for label, (where, checks) in found.items() if checks}
    if not found:
        return []
    steps = sorted({step for _, checks in found.values() for step in checks})
    steps = sorted({*steps[:: -(-len(steps) // POINTS)], steps[-1]})
    columns = [f"{label}: {what}" for label in found for what in ("KL", "agreement", "entropy")]
    rows = []
    for step in steps:
        row = [str(step)]
        for _, checks in found.values():
            check = checks.get(step, {})
            row += [_number(check.get("kl")), _percent(check.get("agreement")), _number(check.get("entropy"))]
        rows.append(row)
    where = [f"{label}: {text}." for label, (text, _) in found.items()]
    return [
        "On the way, by step: divergence from the experts' predictions (KL, nats), share of inputs with the "
        "expert's answer (%), and entropy of the predictions (nats), mean over the tasks, first seed:",
        grid(["step", *columns], rows, where),
    ]


def _checks(run: Run, label: str) -> tuple[str, dict[int, dict[str, Any]]]:
    """What a learned row's checks are measured on, and the checks by step; empty without any."""
    rows = [row for row in run.rows if row.label == label and row.group is None and row.history]
    if not rows:
        return "", {}
    held = (rows[0].settings.get("adapt") or {}).get("held_out")
    found: dict[int, dict[str, Any]] = {}
    for record in rows[0].history:
        by_task = record.get("check") or {}
        entropies = [check["entropy"] for check in by_task.values() if "entropy" in check]
        if entropies:
            entropy = sum(entropies) / len(entropies)
            found[record["step"]] = {"entropy": entropy, **{k: record.get(k) for k in ("kl", "agreement")}}
    return "on held-out inputs" if held else "on inputs it learns from, it holds none out", found


def grid(columns: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """A table in Markdown, the notes below."""
    return markdown(Cells(columns, rows, notes, 1)).rstrip()


def _mean(line: Line, names: Sequence[str], *, condition: str = CLEAN, unseen: bool = False) -> float | None:
    """Mean over tasks of a line's accuracy, each over seeds; None where one is missing."""
    found = [line.accuracy(name, condition, unseen=unseen) for name in names]
    values = [each.mean for each in found if each is not None]
    return sum(values) / len(values) if values and len(values) == len(found) else None


def _first(line: Line, name: str, form: Any) -> str:
    """A number of a merged line's first row, as text; nothing where there is none."""
    values: Iterable[Any] = (getattr(row, name) for row in line.rows if line.merged)
    return next((form(value) for value in values if value), "")


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
