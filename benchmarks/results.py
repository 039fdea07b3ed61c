"""Records of suites → docs/results.md.

    python benchmarks/results.py runs/text8 runs/text8-zeroshot runs/vision8 --out docs/results.md
    python benchmarks/results.py runs/vision8 --out docs/results.md --keep --note "2 cores, 2 threads"

Every argument is a folder that `adamerging suite` wrote, finished or not; nothing is computed here, and what
has no records is left out. `--keep` replaces the sections of these suites alone.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from results_compared import compared
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
_SECTION = re.compile(r"<!-- suite: (\S+) -->\n.*?<!-- end: \1 -->\n?", re.DOTALL)


def section(folder: Path, note: str = "") -> str:
    """All that a suite's folder has to show, between two marks; nothing of a folder without records."""
    name = folder.resolve().name
    suite = load_suite(name) if name in names() else None
    command = f"adamerging suite {name} --data DATA"
    parts = [*training(folder, suite, command), *comparisons(folder, suite, command)]
    if not parts:
        return ""
    about = [suite.about, ""] if suite else []
    noted = [note, ""] if note else []
    lines = [f"<!-- suite: {name} -->", f"## {name}", "", *about, *noted, *parts]
    return "\n".join(lines).rstrip() + f"\n\n<!-- end: {name} -->\n"


def training(folder: Path, suite: Suite | None, command: str) -> list[str]:
    """Experts, other ways to train, and shared layers."""
    order = suite.data.tasks if suite else sorted(path.parent.name for path in folder.glob(f"*/{RECORD}"))
    found, lines = trainings(folder, order), []
    if found:
        stages = f"`{command} --stage finetune`, `--stage baselines`"
        about = [f"{name}: {one.about}" for name, one in suite.baselines.items()] if suite else []
        known = [f"- {line}" for line in about if line.partition(":")[0] in found]
        lines += ["### Training", "", f"Accuracy on the whole test sets. {stages}", ""]
        lines += [*known, ""] if known else []
        lines += [trained(found, order), ""]
    sharing = shared(folder, order, found)
    if sharing:
        lines += ["### Sharing layers", ""]
        lines += [
            f"Accuracy on the whole test sets, see [Sharing layers](sharing.md). `{command} --stage share`"
        ]
        lines += ["", *(line for part in sharing for line in (part, ""))]
    return lines


def comparisons(folder: Path, suite: Suite | None, command: str) -> list[str]:
    """The suite's own comparison, then its tables in the suite's order."""
    known = [MAIN, *(suite.tables if suite else ())]
    there = [path.parent.name.removeprefix("compare-") for path in sorted(folder.glob(f"*/{COMPARISON}"))]
    lines = []
    for name in dict.fromkeys([*known, *(MAIN if one == "compare" else one for one in there)]):
        place = folder / comparison(name)
        if not (place / COMPARISON).is_file():
            continue
        about = [suite.tables[name].about, ""] if suite and name in suite.tables else []
        option = "" if name == MAIN else f" --table {name}"
        lines += [f"### {'Methods' if name == MAIN else name.capitalize()}", "", *about]
        lines += compared(place, f"{command} --stage compare{option}")
    return lines


def page(sections: dict[str, str], before: str = "") -> str:
    """The whole page: old sections, replaced where there are new ones, then those that are new."""
    old = {match[1]: match[0] for match in _SECTION.finditer(before)}
    return "\n".join([HEAD, *({**old, **sections}.values())])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--note", default="", help="a sentence for these suites, such as cores and threads")
    parser.add_argument("--keep", action="store_true", help="keep the sections of other suites in FILE")
    options = parser.parse_args(arguments)
    made = {folder.resolve().name: section(folder, options.note) for folder in options.folders}
    before = options.out.read_text(encoding="utf-8") if options.keep and options.out.is_file() else ""
    text = page({name: text for name, text in made.items() if text}, before)
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
