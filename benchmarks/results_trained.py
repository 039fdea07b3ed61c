"""What training left → Markdown: experts, the other ways to train, and layers shared over one base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from results_compared import grid

from adamerging.finetuning.record import read_record
from adamerging.finetuning.settings import MULTITASK
from adamerging.sharing.collect import FIGURES
from adamerging.units import duration
from adamerging.weights.shared_store import is_store, read_index

EXPERTS = "expert"
BASELINES = "baselines"
SHARED = "shared"
Records = dict[str, dict[str, Any]]


def trainings(folder: Path, order: Sequence[str]) -> dict[str, Records]:
    """Records by way to train and task: experts, the joint model, and every baseline; none that is missing.

    Args:
        folder: of the suite.
        order: the tasks' names as the suite has them.
    """
    places = {EXPERTS: folder, MULTITASK: folder / MULTITASK}
    places |= {path.name: path for path in sorted((folder / BASELINES).glob("*")) if path.is_dir()}
    found = {}
    for way, place in places.items():
        records = {task: read_record(place / task) for task in order}
        if any(records.values()):
            found[way] = {task: record for task, record in records.items() if record is not None}
    return found


def trained(found: Mapping[str, Records], order: Sequence[str]) -> str:
    """Test accuracy by task of every way to train, and what all tasks take together."""
    rows = [[task, *(_percent(_test(records.get(task))) for records in found.values())] for task in order]
    body = body_of(found)
    whole = [records if len(records) == len(order) else {} for records in found.values()]
    rows.append(["mean", *(_percent(_mean([_test(record) for record in all_.values()])) for all_ in whole)])
    rows.append(["parameters", *(_multiple(way, all_, body) for way, all_ in zip(found, whole, strict=True))])
    rows.append(["training", *(_seconds(way, all_) for way, all_ in zip(found, whole, strict=True))])
    threads = {record["machine"]["threads"] for records in found.values() for record in records.values()}
    notes = [
        "Parameters: all that has to be kept for all tasks together, in multiples of one model: what was "
        "trained for each task, and once what all share.",
        "Training: the time of all tasks, one after the other; threads: "
        f"{', '.join(map(str, sorted(threads)))}.",
    ]
    return grid(["task", *found], rows, notes)


def body_of(found: Mapping[str, Records]) -> int:
    """Parameters of one model without its head.

    A probe trains its head alone, so what it froze is the body; without one, the smallest model with its
    head is as near as makes no difference here.
    """
    every = [record for records in found.values() for record in records.values()]
    frozen = [record["frozen_parameters"] for record in every if record["settings"].get("freeze") == ["*"]]
    plain = [record for record in every if not record["settings"].get("lora")]
    return min(frozen or [r["trained_parameters"] + r["frozen_parameters"] for r in plain or every])


def shared(folder: Path, order: Sequence[str], found: Mapping[str, Records]) -> list[str]:
    """Accuracy against parameters of tasks that share a base, the other ways beside; nothing without."""
    trials = _trials(folder / f"{SHARED}.tasks", order)
    store = read_index(folder / SHARED).record if is_store(folder / SHARED) else {}
    trials = trials or store.get("trials", [])
    if not trials:
        return []
    body = body_of(found) if found else store.get("base_parameters")
    rows = []
    for penalty in sorted({trial["penalty"] for trial in trials}):
        mine = [trial for trial in trials if trial["penalty"] == penalty]
        rows.append([f"shared, penalty {penalty:g}", *_point(mine, order, body)])
    chosen = store.get("tasks", {}) if len(rows) > 1 else {}
    if chosen:
        rows.append(["shared, a penalty for each task", *_point(list(chosen.values()), order, body)])
    for way, records in found.items():
        if len(records) == len(order) and body:
            accuracy = _percent(_mean([_test(record) for record in records.values()]))
            rows.append([way, accuracy, _multiple(way, records, body), "", ""])
    parts = [grid(["", "mean, %", "parameters", "open layers", "tasks"], rows)]
    if chosen:
        choices = [_choice(task, one, body) for task, one in chosen.items()]
        parts.append("Chosen by `val`, a task's own parameters in multiples of one model:")
        parts.append(grid(["task", "penalty", "test, %", "open layers", "own parameters"], choices))
    return parts


def _choice(task: str, one: Mapping[str, Any], body: int | None) -> list[str]:
    """What one task took."""
    own = sum(one["parameters"].values())
    opened = f"{one['open']} of {one['layers']}"
    share = f"{own / body:.3f}" if body else "-"
    return [task, f"{one['penalty']:g}", _percent(one.get("test_accuracy")), opened, share]


def _trials(folder: Path, order: Sequence[str]) -> list[dict[str, Any]]:
    """Every training with a penalty that is done."""
    found = []
    for task in order:
        for place in sorted((folder / task).glob("penalty-*")):
            record, figures = read_record(place), place / FIGURES
            if record is not None and figures.is_file():
                penalty = float(place.name.removeprefix("penalty-"))
                own = json.loads(figures.read_text(encoding="utf-8"))
                scores = {key: record.get(key) for key in ("val_accuracy", "test_accuracy")}
                found.append({"task": task, "penalty": penalty, **scores, **own})
    return found


def _point(trials: Sequence[Mapping[str, Any]], order: Sequence[str], body: int | None) -> list[str]:
    """A point of the frontier: mean accuracy, parameters of all, share of open layers, how many tasks."""
    share = _mean([trial["open"] / trial["layers"] for trial in trials])
    own = sum(sum(trial["parameters"].values()) for trial in trials)
    done = len(trials) == len(order)
    return [
        _percent(_mean([trial.get("test_accuracy") for trial in trials])) if done else "-",
        f"{1 + own / body:.2f}" if done and body else "-",
        _percent(share),
        f"{len(trials)} of {len(order)}",
    ]


def _multiple(way: str, records: Records, body: int) -> str:
    """Parameters of all tasks together in multiples of one model.

    Tasks that train all of it share nothing; of the joint model only the heads are several.
    """
    if not records:
        return "-"
    sizes = [(record["trained_parameters"], record["frozen_parameters"]) for record in records.values()]
    own = [learned + frozen - body if way == MULTITASK else learned for learned, frozen in sizes]
    common = body if way == MULTITASK or any(frozen for _, frozen in sizes) else 0
    return f"{(common + sum(own)) / body:.2f}"


def _seconds(way: str, records: Records) -> str:
    seconds = [record["seconds"] for record in records.values()]
    return duration(max(seconds) if way == MULTITASK else sum(seconds)) if seconds else "-"


def _test(record: Mapping[str, Any] | None) -> float | None:
    return None if record is None else record.get("test_accuracy")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.1f}"
