"""Records of comparisons → docs/results.md.

    python benchmarks/results.py runs/text8/compare runs/text8-zeroshot/compare --out docs/results.md

Every argument is a folder that `adamerging compare` or `adamerging suite` wrote; nothing is computed here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from adamerging.report.lines import lines_of
from adamerging.report.load import load_run
from adamerging.report.table import cells_of, markdown
from adamerging.units import duration, size

HEAD = """# Results

Made from the records of comparisons by `python benchmarks/results.py`. Each section names the suite that
makes its records: `adamerging suite NAME --data DATA`, see [Suites](suites.md). Accuracies are in percent on
the whole test sets. *Of experts* is the mean over the tasks of accuracy divided by that of the task's own
expert, with a bootstrap 95 % interval of the test data. Coefficients were learned on the unlabeled `val` part
of each task, which shares no sample with `test`; nothing was chosen on test labels.
"""


def section(folder: Path) -> str:
    """One comparison: the table, the costs, how to make it again."""
    run = load_run(folder)
    about = run.comparison
    suite = folder.parent.name if folder.name == "compare" else folder.name
    samples = sum(task.evaluate_samples for task in about.tasks)
    versions = ", ".join(f"{name} {version}" for name, version in about.versions.items())
    costs = [
        f"| {line.label} | {duration(row.seconds)} | {size(row.memory) if row.memory else ''} "
        f"| {row.parameters or ''} |"
        for line in lines_of(run)
        for row in line.rows[:1]
        if row.seconds is not None and row.kind in ("static", "learned", "average")
    ]
    return "\n".join(
        [
            f"## {suite}",
            "",
            f"{len(about.experts)} experts, {samples} test samples; {versions}.",
            "",
            f"`adamerging suite {suite} --data DATA`",
            "",
            markdown(cells_of(run)).rstrip(),
            "",
            "| | time to make | memory of the process by then | learned coefficients |",
            "|---|--:|--:|--:|",
            *costs,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.write_text("\n".join([HEAD, *(section(folder) for folder in options.folders)]))


if __name__ == "__main__":
    main()
