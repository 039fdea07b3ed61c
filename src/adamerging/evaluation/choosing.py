"""Choose one candidate of a sweep by labels, and say by which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..adaptation.state import discard_state
from ..errors import UsageError
from ..tasks.data import count_shared
from ..tasks.task import Samples, Task
from .bench import Bench
from .entries import Candidate, Wanted
from .limit import first
from .making import Made, Maker


@dataclass(frozen=True)
class Choice:
    """A candidate, made.

    Attributes:
        candidate: the one that was chosen.
        made: how it came to be; the body is that model.
        settings: what it takes to make it again, and the mean accuracy of each that was tried.
        chosen_on: the labels that chose; None without a choice.
    """

    candidate: Candidate
    made: Made
    settings: dict[str, Any]
    chosen_on: Literal["val", "test"] | None = None


def check_choices(wanted: Sequence[Wanted], tasks: Sequence[Task]) -> None:
    """Refuse a choice by val labels that are those scored on, as transductive data can be.

    Raises:
        UsageError: data to choose on and data to score on share samples.
    """
    choosing = [
        item.label
        for item in wanted
        if item.recipe.transductive and item.entry.choose_on == "val" and len(item.candidates()) > 1
    ]
    if not choosing:
        return
    shared = [
        task.name
        for task in tasks
        if task.adapt is not None and task.evaluate is not None and count_shared(task.evaluate, task.adapt)
    ]
    if shared:
        raise UsageError(
            f"{', '.join(choosing)}: the sweep is chosen by the labels of the adaptation data, and of "
            f"{', '.join(shared)} these are the labels that are scored on (transductive); say choose_on: "
            "test, which marks the row as an oracle, or give disjoint splits"
        )


def choose(
    wanted: Wanted, seed: int | None, maker: Maker, bench: Bench, tasks: Sequence[str], state: Path
) -> Choice:
    """Make every candidate of a sweep, and then the one with the best mean accuracy (the first of equals).

    Args:
        wanted: with its sweep.
        seed: of the row.
        maker: makes the body a candidate.
        bench: scores it.
        tasks: whose labels choose.
        state: where learning saves its state.

    Raises:
        UsageError: labels to choose by are missing.
        AdamergingError: a candidate cannot be made.
    """
    candidates = wanted.candidates(seed)
    if len(candidates) == 1:
        made = maker.merge(candidates[0], state)
        return Choice(candidates[0], made, _settings(candidates[0]))
    on = wanted.entry.choose_on
    judges = {name: _judge(bench, name, on) for name in tasks if name in maker.experts}
    found: list[tuple[float, Candidate, Made]] = []
    for number, candidate in enumerate(candidates):
        maker.say(f"{wanted.label}: trying {_told(candidate)}")
        saved = state.with_name(f"{state.stem}-{number}{state.suffix}")
        made = maker.merge(candidate, saved)
        model = bench.fingerprint()
        scores = []
        for name, samples in judges.items():
            with made.model_for(name, bench, model) as own:
                scores.append(bench.score(own, name, samples).record.accuracy)
        found.append((sum(scores) / len(scores), candidate, made))
    for number in range(len(candidates)):
        discard_state(state.with_name(f"{state.stem}-{number}{state.suffix}"))
    best = max(found, key=lambda item: item[0])
    if best is not found[-1]:
        best[2].again()
    tried = [{**candidate.tried, "accuracy": accuracy} for accuracy, candidate, _ in found]
    return Choice(best[1], best[2], _settings(best[1]) | {"tried": tried}, on)


def _judge(bench: Bench, name: str, on: str) -> Samples:
    """The labelled samples that choose."""
    task = bench.seats[name].task
    samples = task.adapt if on == "val" else task.evaluate
    if samples is None or samples.labels is None:
        raise UsageError(
            f"task '{name}': its {'adaptation' if on == 'val' else 'evaluation'} data has no labels, so that "
            "nothing can be chosen by them; give labelled data, or choose_on: test for an oracle"
        )
    return first(samples, bench.settings.limit)


def _settings(candidate: Candidate) -> dict[str, Any]:
    """What it takes to make a candidate again."""
    if candidate.adapt is not None:
        return {
            "adapt": candidate.adapt.model_dump(exclude_defaults=True) | {"preset": candidate.adapt.preset}
        }
    settings = candidate.settings
    assert candidate.method is not None
    scale = candidate.method.scale if settings.scale is None else settings.scale
    return (
        {"method": settings.method, "scale": scale}
        | ({} if settings.weights == 1.0 else {"weights": settings.weights})
        | ({"batchnorm": "keep"} if candidate.keeps_statistics else {})
    )


def _told(candidate: Candidate) -> str:
    return ", ".join(f"{key} {value}" for key, value in candidate.tried.items())
