"""A merge plan and scores as tables, for `merge` and `inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from . import show

if TYPE_CHECKING:
    from rich.table import Table

    from ..plan import Plan
    from ..run import Prepared


def treatments(plan: Plan) -> Table:
    """How many tensors are treated how, and why."""
    summary = plan.summary()
    rows = []
    for key, found in summary["reasons"].items():
        treatment, _, reason = key.partition(": ")
        rows.append((treatment, found["tensors"], show.count(found["parameters"]), reason))
    for expert, found in summary["heads"].items():
        if found["tensors"]:
            reason = f"kept for {expert}, beside the body"
            rows.append(("head", found["tensors"], show.count(found["parameters"]), reason))
    order = ("merged", "averaged", "base", "head")
    rows.sort(key=lambda row: order.index(row[0]))
    return show.table("", ["treatment", ">tensors", ">parameters", "why"], rows)


def tensors(plan: Plan) -> Table:
    """Every tensor."""
    rows = [
        (
            row["name"],
            row["treatment"],
            "×".join(map(str, row["shape"])) or "scalar",
            row["dtype"],
            row["reason"],
        )
        for row in plan.rows()
    ]
    return show.table("Tensors", ["name", "treatment", "shape", "dtype", "why"], rows)


def scores_table(record: Mapping[str, Any]) -> Table:
    """Accuracy by task and model, their means, and the share of the experts' accuracy."""
    scores = record["scores"]
    models = list(scores["mean"])
    found = {(row["task"], row["model"]): row["accuracy"] for row in scores["records"]}
    tasks = list(dict.fromkeys(row["task"] for row in scores["records"]))
    rows: list[tuple[str, ...]] = [(task, *(f"{found[task, m]:.1%}" for m in models)) for task in tasks]
    rows.append(("mean", *(f"{scores['mean'][m]:.1%}" for m in models)))
    shares = (scores["normalised"][m] for m in models)
    rows.append(("of the experts'", *("" if share is None else f"{share:.1%}" for share in shares)))
    said = [name for name in ("labelled", "transductive") if record.get(name)]
    title = "Accuracy" + (f" ({', '.join(said)})" if said else "")
    return show.table(title, ["task", *(f">{m}" for m in models)], rows)


def notes_of(prepared: Prepared) -> list[str]:
    """What a reader should know: of the files as they were opened, and of the plan."""
    return [*_of_weights(prepared), *prepared.plan.notes]


def _of_weights(prepared: Prepared) -> Iterator[str]:
    yield from (f"base: {text}" for text in prepared.vectors.base.notes)
    for task, weights in prepared.vectors.experts.items():
        yield from (f"expert '{task}': {text}" for text in weights.notes)
