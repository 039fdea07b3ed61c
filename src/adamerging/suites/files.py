"""A suite's file → recipes: placeholders filled, what holds for each task written out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..errors import MissingExtraError, UsageError
from ..recipe import read_yaml
from ..validation import make

FOLDER = Path(__file__).parent
MAIN = "main"
"""Name of the suite's own comparison among its tables."""
ALL = "all"
_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")
_NAME = re.compile(r"[a-z0-9_-]+")


class SuiteData(BaseModel):
    """Which data sets a suite needs, as folders under ``--data``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    seen: str | None = Field(
        None, description="Folder of a task's data, with ${task}; None where no folder is needed."
    )
    tasks: list[str] = Field(description="The tasks that have experts.")
    unseen: list[str] = Field([], description="Folders of the tasks that have none.")


class Baseline(BaseModel):
    """Another way to train the tasks, to set beside the experts."""

    model_config = ConfigDict(extra="forbid", strict=True)

    about: str = Field(description="One sentence.")
    recipe: dict[str, Any] = Field(description="Fields over the suite's fine-tuning recipe.")


class Table(BaseModel):
    """A further comparison of a suite."""

    model_config = ConfigDict(extra="forbid", strict=True)

    about: str = Field(description="One sentence.")
    recipe: dict[str, Any] = Field({}, description="Fields over the suite's recipe.")
    compare: dict[str, Any] = Field(
        description="As `compare:` of a recipe; a label of the suite's own comparison stands for its entry."
    )


class Suite(BaseModel):
    """One file of this folder."""

    model_config = ConfigDict(extra="forbid", strict=True)

    title: str
    about: str
    values: dict[str, str | dict[str, str]] = Field(
        {}, description="Placeholders of the suite's own, by name: a text, or a text by task."
    )
    hub: bool = Field(False, description="Base, experts and data come from the hub unless told otherwise.")
    extra: str | None = Field(None, description="Extra of this package with what the suite needs.")
    data: SuiteData
    floors: dict[str, float] = Field({}, description="Test accuracy in percent that an expert must reach.")
    finetune: dict[str, Any] | None = Field(
        None, description="A fine-tuning recipe; `each` holds for every task. None: the experts exist."
    )
    share: dict[str, Any] | None = Field(
        None, description="What the stage share adds to the fine-tuning recipe: gates and penalties."
    )
    recipe: dict[str, Any] = Field(description="A merge recipe; `each` holds for every task.")
    merge: dict[str, Any] = Field(description="What the stage merge adds to the recipe.")
    compare: dict[str, Any] = Field(description="What the stage compare adds, as `compare:`.")
    tables: dict[str, Table] = Field({}, description="Further comparisons by name.")
    baselines: dict[str, Baseline] = Field({}, description="Other ways to train, by name.")

    @field_validator("tables", "baselines")
    @classmethod
    def _names_of_files(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if not _NAME.fullmatch(name) or name in (MAIN, ALL):
                raise ValueError(f"'{name}' cannot be a name here: lower-case letters, digits, - and _, "
                                 f"and neither {MAIN} nor {ALL}")  # fmt: skip
        return named


@dataclass(frozen=True)
class Filled:
    """A suite with its paths.

    Attributes:
        suite: the file.
        finetune: fields of the fine-tuning recipe; None where the experts exist already.
        share: fields of the sharing recipe; None where the suite has none.
        merge: fields of the merge recipe.
        compare: the same with `compare:` in the place of how to merge.
        tables: fields of the recipes of further comparisons, by name.
        baselines: fields of other fine-tuning recipes, by name.
        folders: data folders under ``--data``, those of unseen tasks last.
    """

    suite: Suite
    finetune: dict[str, Any] | None
    share: dict[str, Any] | None
    merge: dict[str, Any]
    compare: dict[str, Any]
    tables: dict[str, dict[str, Any]]
    baselines: dict[str, dict[str, Any]]
    folders: tuple[str, ...]

    @property
    def recipes(self) -> dict[str, dict[str, Any]]:
        """Fields of every recipe, by name of its file without the suffix."""
        stages = {stage: getattr(self, stage) for stage in ("finetune", "share", "merge", "compare")}
        named = {f"baseline-{name}": fields for name, fields in self.baselines.items()}
        named |= {comparison(name): fields for name, fields in self.tables.items()}
        return {name: fields for name, fields in {**stages, **named}.items() if fields is not None}

    def write(self, out: Path) -> dict[str, Path]:
        """Write the recipes as files that `adamerging finetune`, `share`, `merge` and `compare` take."""
        out.mkdir(parents=True, exist_ok=True)
        paths = {}
        for name, fields in self.recipes.items():
            paths[name] = out / f"{name}.yaml"
            text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=110)
            partial = out / f".{name}.yaml.partial"
            partial.write_text(f"# {self.suite.title}, {name}\n{text}", encoding="utf-8")
            partial.replace(paths[name])
        return paths


def comparison(table: str) -> str:
    """Name of a comparison's folder, and of its recipe without the suffix."""
    return "compare" if table == MAIN else f"compare-{table}"


def names() -> list[str]:
    """The suites there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_suite(name: str) -> Suite:
    """One suite's file.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in names():
        raise UsageError(f"there is no suite '{name}'; suites: {', '.join(names())}")
    path = FOLDER / f"{name}.yaml"
    return make(Suite, _read(path), str(path))


def _read(path: Path) -> dict[str, Any]:
    """A suite's fields: those of the suite it is `like`, with its own in their place; `values` one by one."""
    fields = read_yaml(path)
    like = fields.pop("like", None)
    if like is None:
        return fields
    other = _read(path.with_name(f"{like}.yaml"))
    return {**other, **fields, "values": {**other.get("values", {}), **fields.get("values", {})}}


def fill(
    suite: Suite,
    *,
    data: Path | None,
    out: Path,
    tasks: list[str] | None = None,
    multitask: bool = False,
    values: Mapping[str, str] | None = None,
) -> Filled:
    """Fill a suite's placeholders.

    Args:
        suite: see `load_suite`.
        data: folder of the data sets, ``${data}``; None for a suite that needs none.
        out: folder of the results, ``${out}``.
        tasks: keep these tasks alone.
        multitask: also train one body on all tasks jointly. A comparison names models made elsewhere only
            where they are there, or will be by this.
        values: placeholders of the suite's own that get another text; paths in them are relative to the
            working directory.

    Raises:
        UsageError: no such task, no such placeholder to change, or a placeholder that stands for nothing.
        MissingExtraError: a package that a placeholder names is not installed.
    """
    _check_asked(suite, tasks or [], multitask, values or {})
    kept = [task for task in suite.data.tasks if not tasks or task in tasks]
    common_words = {"out": str(out.resolve())} | ({} if data is None else {"data": str(data.resolve())})
    own_words = {**suite.values, **_from_here(values or {}, suite)}

    def words(task: str | None) -> dict[str, str]:
        known = common_words if task is None else {**common_words, "task": task}
        for name, value in own_words.items():
            text = value.get(task or "") if isinstance(value, dict) else value
            if text is None or (task is None and "${task}" in text):
                continue  # only known for a task
            known = {**known, name: _filled(text, known, suite)}
        return known

    def filled(value: Any, task: str | None = None) -> Any:
        return _filled(value, words(task), suite)

    def by_task(section: Mapping[str, Any]) -> dict[str, Any]:
        own = section.get("tasks", {})
        return {task: filled({**section.get("each", {}), **own.get(task, {})}, task) for task in kept}

    def rest(section: Mapping[str, Any]) -> dict[str, Any]:
        skipped = ("each", "tasks", "experts")
        return {key: filled(value) for key, value in section.items() if key not in skipped}

    def trained_by(section: Mapping[str, Any]) -> dict[str, Any]:
        return {**rest(section), "tasks": by_task(section)}

    def merged_by(section: Mapping[str, Any]) -> dict[str, Any]:
        experts = {task: filled(section["experts"], task) for task in kept}
        return {**rest(section), "experts": experts, "tasks": by_task(section)}

    def compared(section: Mapping[str, Any]) -> dict[str, Any]:
        return _there(filled(_without(section, kept)), kept, whole=multitask)

    baselines = {}
    finetune = share = None
    if suite.finetune is not None:
        training = trained_by(suite.finetune)
        finetune = {**training, "multitask": multitask}
        share = None if suite.share is None else {**training, **filled(suite.share)}
        for name, baseline in suite.baselines.items():
            own = {**suite.finetune, "out": f"${{out}}/baselines/{name}"}
            baselines[name] = trained_by(_over(own, baseline.recipe))
    common = merged_by(suite.recipe)
    return Filled(
        suite,
        finetune,
        share,
        {**common, **filled(suite.merge)},
        {**common, "compare": compared(suite.compare)},
        {
            name: {
                **merged_by(_over(suite.recipe, table.recipe)),
                "compare": compared(_labelled(table.compare, suite.compare)),
            }
            for name, table in suite.tables.items()
        },
        baselines,
        tuple([filled(suite.data.seen, task) for task in kept if suite.data.seen] + suite.data.unseen),
    )


def _check_asked(suite: Suite, tasks: Sequence[str], multitask: bool, values: Mapping[str, str]) -> None:
    """Refuse what a suite does not have. Raises as `fill`."""
    unknown = [task for task in tasks if task not in suite.data.tasks]
    if unknown:
        raise UsageError(
            f"no task {', '.join(unknown)} in the suite {suite.title}; it has {', '.join(suite.data.tasks)}"
        )
    strange = [name for name in values if name not in suite.values]
    if strange:
        raise UsageError(
            f"the suite {suite.title} has no placeholder {', '.join(strange)} to set; "
            f"it has {', '.join(suite.values) or 'none'}"
        )
    if multitask and suite.finetune is None:
        raise UsageError(f"the suite {suite.title} trains nothing, so multitask is of no use")


def _from_here(values: Mapping[str, str], suite: Suite) -> dict[str, str]:
    """Texts that replace a suite's own, their paths absolute: the recipes that they go into lie elsewhere.

    A path is what is there, or for each task what may be there: what does not exist is an id of the hub.
    """
    sections = suite.model_dump()

    def absolute(text: str) -> str:
        before, found, _ = text.partition("${task}")
        there = Path(f"{before}_").expanduser().parent if found else Path(text).expanduser()
        return str(Path.cwd() / Path(text).expanduser()) if text and there.exists() else text

    return {name: absolute(text) if _leads(name, sections) else text for name, text in values.items()}


def _leads(name: str, value: Any) -> bool:
    """Whether a placeholder begins some text, as a path's does: ``${images}:${split}`` is one of images."""
    if isinstance(value, dict):
        return any(_leads(name, each) for each in value.values())
    if isinstance(value, list):
        return any(_leads(name, each) for each in value)
    return isinstance(value, str) and value.startswith(f"${{{name}}}")


def _over(general: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, Any]:
    """Fields with those of the special case in their place; sections, such as `each`, field by field."""
    result = dict(general)
    for key, value in special.items():
        both = isinstance(value, Mapping) and isinstance(general.get(key), Mapping)
        result[key] = _over(general[key], value) if both else value
    return result


def _labelled(compare: Mapping[str, Any], main: Mapping[str, Any]) -> dict[str, Any]:
    """A comparison in which labels of the main one are its entries."""
    known = {label: item for item in main["methods"] if isinstance(item, dict) for label in item}
    methods = [known.get(item, item) if isinstance(item, str) else item for item in compare["methods"]]
    return {**compare, "methods": methods}


def _without(compare: Mapping[str, Any], kept: list[str]) -> dict[str, Any]:
    """The comparison of some of the tasks: those that were left aside are neither shifted nor left out.

    Nor is a split left out that would leave nothing to merge.
    """
    result = dict(compare)
    shift, unseen = compare.get("shift"), compare.get("unseen")
    if shift and shift.get("tasks"):
        left = [task for task in shift["tasks"] if task in kept]
        result["shift"] = {**shift, "tasks": left} if left else None
    if unseen and isinstance(unseen.get("leave_out"), list):
        splits = [split for split in unseen["leave_out"] if set(split) < set(kept)]
        result["unseen"] = {**unseen, "leave_out": splits or None}
    return result


def _there(compare: dict[str, Any], kept: Sequence[str], *, whole: bool) -> dict[str, Any]:
    """The comparison without the models that nobody has trained.

    Args:
        compare: with its paths.
        kept: tasks, whose names their folders have.
        whole: they will be trained.
    """
    models = {
        label: folder
        for label, folder in compare.get("models", {}).items()
        if whole or any((Path(folder) / task).is_dir() for task in kept)
    }
    rest = {key: value for key, value in compare.items() if key != "models"}
    return {**rest, "models": models} if models else rest


def _filled(value: Any, known: Mapping[str, str], suite: Suite) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, known, suite) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, known, suite) for item in value]
    if not isinstance(value, str):
        return value

    def replaced(match: re.Match[str]) -> str:
        word = match[1]
        if word.startswith("package:"):
            return _package(word.removeprefix("package:"), suite)
        if word not in known:
            raise UsageError(f"{suite.title}: ${{{word}}} stands for nothing; known: {', '.join(known)}")
        return known[word]

    return _PLACEHOLDER.sub(replaced, value)


def _package(name: str, suite: Suite) -> str:
    found = find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(name, suite.extra or "demo", f"the suite {suite.title}")
    return found.submodule_search_locations[0]
