"""The answer in plain words, computed from the records: what a reader takes along who reads no further."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..evaluation.records import EXPERTS
from ..units import duration, size
from .aggregate import Spread
from .document import listed, percent
from .lines import MARKS, Line
from .view import View


@dataclass(frozen=True)
class Verdict:
    """What is said on top.

    Attributes:
        headline: one sentence.
        sentences: what stands behind it.
        figures: (number, what it is) of the few numbers that matter.
        cautions: (about what, sentence) of what a reader must know before trusting it.
        status: the same of a run that is not whole, which stands above everything else.
    """

    headline: str
    sentences: tuple[str, ...]
    figures: tuple[tuple[str, str], ...]
    cautions: tuple[tuple[str, str], ...]
    status: tuple[str, str] | None = None


def verdict(view: View) -> Verdict:
    """Judge a run by its records."""
    cautions = tuple(_cautions(view))
    winner = view.winner
    if winner is None:
        return Verdict("There is no merged model with scores in this run.", (), (), cautions, _status(view))
    mean, kept = winner.mean(view.tasks), winner.kept(view.tasks)
    assert mean is not None
    figures = [(percent(mean.mean), "mean accuracy")]
    if kept is not None:
        where = " in one model" if winner.single else ""
        headline = f"{winner.label} keeps {percent(kept.mean)} of the experts’ accuracy{where}."
        figures.insert(0, (percent(kept.mean), "of the experts’ accuracy kept"))
    else:
        headline = f"{winner.label} is the best merged model: {percent(mean.mean)} mean accuracy."
    worst = _worst(view, winner)
    if worst is not None:
        figures.append((percent(worst[1]), f"kept on the worst task, {worst[0]}"))
    row = winner.rows[0]
    if row.seconds is not None:
        figures.append((duration(row.seconds), "to make it"))
    return Verdict(headline, tuple(_sentences(view, winner)), tuple(figures), cautions, _status(view))


def _sentences(view: View, winner: Line) -> Iterator[str]:
    mean, kept = winner.mean(view.tasks), winner.kept(view.tasks)
    assert mean is not None
    others = [
        f"{name} {percent(found.mean)}"
        for line in view.lines
        for name in [
            {
                "expert": "the experts, one model a task,",
                "base": "the base",
                "average": "plain averaging",
            }.get(line.kind)
        ]
        for found in [line.mean(view.tasks)]
        if name is not None and found is not None and line is not winner
    ]
    count = len(view.tasks)
    text = f"Over {count} task{'s' * (count != 1)} its mean accuracy is {percent(mean.mean)}{_seeds(mean)}"
    yield text + (f"; {', '.join(others)}." if others else ".")
    interval = winner.interval()
    if kept is not None and interval is not None:
        yield (
            f"The 95 % interval of the share that is kept is {100 * interval[0]:.1f} to "
            f"{percent(interval[1])}, from the size "
            "of the test data."
        )
    worst = _worst(view, winner)
    if worst is not None:
        task = worst[0]
        own, expert = winner.accuracy(task), _experts(view, task)
        if own is not None and expert is not None:
            text = f"{percent(own.mean)} where the expert has {percent(expert.mean)}"
            yield f"Its worst task is {task}: {text}."
    second = _second(view, winner)
    if second is not None:
        yield second
    row = winner.rows[0]
    parts = []
    if row.parameters:
        parts.append(f"{row.parameters:,} learned coefficients")
    if row.seconds is not None:
        parts.append(duration(row.seconds))
    if row.memory is not None:
        parts.append(f"{size(row.memory)} of memory")
    if parts:
        yield f"It cost {', '.join(parts)}."


def _second(view: View, winner: Line) -> str | None:
    """The runner-up, and whether the difference is more than chance."""
    rest = [line for line in view.by_quality() if line.counts and line is not winner]
    rest.sort(key=lambda line: -(found.mean if (found := line.kept(view.tasks)) else -1.0))
    ours = winner.kept(view.tasks)
    theirs = rest[0].kept(view.tasks) if rest else None
    interval = winner.interval()
    if ours is None or theirs is None:
        return None
    text = f"Next comes {rest[0].label} with {percent(theirs.mean)}"
    if interval is not None and theirs.mean >= interval[0]:
        return text + ", within that interval: the test data alone does not tell the two apart."
    return text + "."


def _worst(view: View, line: Line) -> tuple[str, float] | None:
    ratios = [(task, ratio) for task in view.tasks if (ratio := line.ratio(task)) is not None]
    return min(ratios, key=lambda pair: pair[1]) if len(ratios) == len(view.tasks) > 1 else None


def _experts(view: View, task: str) -> Spread | None:
    return next((line.accuracy(task) for line in view.lines if line.label == EXPERTS), None)


def _seeds(found: Spread) -> str:
    return f" (±\u00a0{100 * found.std:.1f} over {found.count} seeds)" if found.std is not None else ""


def _status(view: View) -> tuple[str, str] | None:
    planned, there = view.comparison.planned, len(view.run.rows)
    rows = f"{there} of {planned} rows" if planned else f"{there} rows"
    if not view.comparison.complete:
        return (
            "This run is not finished",
            f"{rows} are there, and the report shows those alone. The same command goes on.",
        )
    if view.run.missing:
        return "Rows are missing", f"{rows} are there, though the run was finished."
    return None


def _cautions(view: View) -> Iterator[tuple[str, str]]:
    run = view.run
    for problem in run.problems:
        yield "A record file is damaged", problem
    said: dict[tuple[str, str], list[str]] = {}
    for row in run.rows:
        texts = [*row.warnings, *([f"failed: {row.failed}"] if row.failed is not None else [])]
        label = row.label if row.group is None else f"{row.label}, made of some of the experts"
        for text in texts:
            seeds = said.setdefault((label, text), [])
            seeds.extend([] if row.seed is None else [str(row.seed)])
    for (label, text), seeds in said.items():
        yield (f"{label} (seed {listed(list(dict.fromkeys(seeds)))})" if seeds else label), text
    for mark in ("oracle", "labelled", "transductive"):
        marked = [line.label for line in view.lines if mark in line.marks]
        if marked:
            apart = "" if mark == "transductive" else " It is not counted as the best model."
            yield listed(marked, 4), MARKS[mark] + apart
