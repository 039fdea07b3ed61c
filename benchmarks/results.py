"""Records of suites → docs/results.md.

    python benchmarks/results.py runs/text8 runs/text8-zeroshot runs/vision8 --out docs/results.md
    python benchmarks/results.py runs/vision8 --out docs/results.md --keep --note "2 cores, 2 threads"

Every argument is a folder that `adamerging suite` wrote, finished or not; nothing is computed here, and what
has no records is left out. `--keep` replaces what there are records of and leaves the rest of the page as it
is: other suites, other parts, and of what was trained the columns and rows that these records have not.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from results_compared import compared, grid
from results_kept import column_of, with_columns_of, with_rows_of
from results_trained import shared, trained, trainings

from adamerging.finetuning.record import RECORD
from adamerging.report.load import RECORD as COMPARISON
from adamerging.suites.files import MAIN, Suite, comparison, load_suite, names

HEAD = """# Results

Made from records by `python benchmarks/results.py`; every section names the command that makes its records,
see [Suites](suites.md). Accuracies are in percent. *Of experts* is the mean over the tasks of accuracy
divided by that of the task's own expert, *95 %* its bootstrap interval over the test data, ± the standard
deviation over seeds. *Unseen* is the mean over tasks that no expert saw, under a linear head fitted once on
the base's features. *Time* is that to merge or learn, and *memory* the most that the process has had to
itself by then.

Settings without a mark were chosen without labels of any kind, and coefficients learned on unlabeled inputs.
Marks: [v] the best of several settings by labels of `val`; [o] by those of `test`, a bound and no result;
[l] learned from labels; [t] adapted to the very inputs that are scored, as in the AdaMerging paper.
"""
_SECTION = re.compile(r"<!-- suite: (\S+) -->\n(.*?)<!-- end: \1 -->\n?", re.DOTALL)
TRAINING, SHARING, METHODS = "Training", "Sharing layers", "Methods"
GLANCE = ("base", "average", "ties", "tsv_m", "wudi", "AdaMerging", "recommended", "multi-task")
"""Models that stand in front of the page."""
Parts = dict[str, str]
"""A suite's text by heading; what stands before the first has none."""


def section(folder: Path, note: str = "") -> Parts:
    """All that a suite's folder has to show; nothing of a folder without records."""
    name = folder.resolve().name
    suite = load_suite(name) if name in names() else None
    command = f"adamerging suite {name} --data DATA"
    parts = {**training(folder, suite, command), **comparisons(folder, suite, command)}
    if not parts:
        return {}
    head = [f"## {name}", *([suite.about] if suite else []), *([note] if note else [])]
    return {"": "\n\n".join(head), **{title: f"### {title}\n\n{text}" for title, text in parts.items()}}


def training(folder: Path, suite: Suite | None, command: str) -> Parts:
    """Experts, other ways to train, and shared layers."""
    order = suite.data.tasks if suite else sorted(path.parent.name for path in folder.glob(f"*/{RECORD}"))
    found, parts = trainings(folder, order), {}
    if found:
        stages = f"`{command} --stage finetune`, `--stage baselines`"
        about = [f"{name}: {one.about}" for name, one in suite.baselines.items()] if suite else []
        known = "\n".join(f"- {line}" for line in about if line.partition(":")[0] in found)
        lines = [f"Accuracy on the whole test sets. {stages}", known, trained(found, order)]
        parts[TRAINING] = "\n\n".join(filter(None, lines))
    sharing = shared(folder, order, found)
    if sharing:
        where = f"see [Sharing layers](sharing.md). `{command} --stage share`"
        parts[SHARING] = "\n\n".join([f"Accuracy on the whole test sets, {where}", *sharing])
    return parts


def comparisons(folder: Path, suite: Suite | None, command: str) -> Parts:
    """The suite's own comparison, then its tables in the suite's order."""
    known = [MAIN, *(suite.tables if suite else ())]
    there = [path.parent.name.removeprefix("compare-") for path in sorted(folder.glob(f"*/{COMPARISON}"))]
    parts = {}
    for name in dict.fromkeys([*known, *(MAIN if one == "compare" else one for one in there)]):
        place = folder / comparison(name)
        if not (place / COMPARISON).is_file():
            continue
        about = [suite.tables[name].about] if suite and name in suite.tables else []
        option = "" if name == MAIN else f" --table {name}"
        lines = [*about, *compared(place, f"{command} --stage compare{option}")]
        parts[METHODS if name == MAIN else name.capitalize()] = "\n\n".join(lines)
    return parts


def read(text: str) -> dict[str, Parts]:
    """The suites of a page that was made before."""
    suites = {}
    for name, body in _SECTION.findall(text):
        head, *pieces = re.split(r"^### ", body, flags=re.MULTILINE)
        titled = {piece.partition("\n")[0]: f"### {piece.strip()}" for piece in pieces}
        suites[name] = {"": head.strip(), **titled}
    return suites


def _together(new: Parts, old: Parts) -> Parts:
    """The new parts with what only the old ones have of other trainings."""
    kept = {TRAINING: with_columns_of, SHARING: with_rows_of}
    return {
        title: kept[title](text, old[title]) if title in kept and title in old else text
        for title, text in new.items()
    }


def glance(suites: dict[str, Parts]) -> str:
    """What a few models keep of the experts' accuracy, the suites side by side."""
    kept = {name: column_of(parts.get(METHODS, ""), "of experts") for name, parts in suites.items()}
    rows = [
        [f"[{name}](#{name})", *(found.get(label, "-") for label in GLANCE)]
        for name, found in kept.items()
        if found
    ]
    head = "In percent of the experts' accuracy, mean over the tasks; more models in each suite's *Methods*:"
    return f"{head}\n\n{grid(['suite', *GLANCE], rows)}\n" if rows else ""


def page(suites: dict[str, Parts]) -> str:
    """The whole page: suites between marks, each its training and methods, then its tables in its order."""
    texts = list(filter(None, [HEAD, glance(suites)]))
    for name, parts in suites.items():
        tables = load_suite(name).tables if name in names() else ()
        first = ["", TRAINING, SHARING, METHODS, *map(str.capitalize, tables)]
        order = sorted(parts, key=lambda title: first.index(title) if title in first else len(first))
        body = "\n\n".join(parts[title] for title in order)
        texts.append(f"<!-- suite: {name} -->\n{body}\n\n<!-- end: {name} -->\n")
    return "\n".join(texts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--note", default="", help="a sentence for these suites, such as cores and threads")
    parser.add_argument("--keep", action="store_true", help="keep what FILE has and FOLDERs have not")
    options = parser.parse_args(arguments)
    kept = read(options.out.read_text(encoding="utf-8")) if options.keep and options.out.is_file() else {}
    for folder in options.folders:
        made = section(folder, options.note)
        if made:
            name = folder.resolve().name
            kept[name] = {**kept.get(name, {}), **_together(made, kept.get(name, {}))}
    text = page(kept)
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
