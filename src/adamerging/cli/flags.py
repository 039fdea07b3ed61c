"""What the arguments mean: sources, and flags that stand for keys of the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError

if TYPE_CHECKING:
    from ..recipe import Recipe


class Buffers(str, Enum):
    """Values of `--buffers`."""

    average = "average"
    base = "base"
    method = "method"
    task = "task"


class Vocabulary(str, Enum):
    """Values of `--vocabulary`."""

    refuse = "refuse"
    shared = "shared"


class Dtype(str, Enum):
    """Values of `--dtype`."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    float64 = "float64"


class Allow(str, Enum):
    """Values of `--allow`."""

    unrelated = "unrelated"
    nonfinite = "nonfinite"


_WHAT = "What is merged"
_TENSORS = "Which tensors"
DATA = "Data"

Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RECIPE.yaml | BASE NAME=PATH...",
        help="A recipe; or the base and then the experts. Each is a file, a folder, a LoRA adapter or a hub "
        "id (org/name@revision). Without NAME= an expert is named after its folder.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option("--base", metavar="PATH", help="The base, instead of the recipe's.", rich_help_panel=_WHAT),
]
Experts = Annotated[
    list[str] | None,
    typer.Option(
        "--expert",
        metavar="NAME=PATH",
        help="An expert; may be repeated. Experts given here replace the recipe's.",
        rich_help_panel=_WHAT,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        metavar="PATTERN",
        help="Merge only tensors whose base name matches; may be repeated.",
        rich_help_panel=_TENSORS,
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        metavar="PATTERN",
        help="Take matching tensors from the base; may be repeated.",
        rich_help_panel=_TENSORS,
    ),
]
Heads = Annotated[
    list[str] | None,
    typer.Option(
        "--heads",
        metavar="PATTERN",
        help="Keep matching tensors per task; may be repeated. Found from the model class when not given.",
        rich_help_panel=_TENSORS,
    ),
]
NoHeads = Annotated[
    bool, typer.Option("--no-heads", help="No tensor is kept per task.", rich_help_panel=_TENSORS)
]
BuffersFlag = Annotated[
    Buffers | None,
    typer.Option(
        "--buffers",
        help="BatchNorm statistics: mean of the experts (average, the default), the base's, merged like "
        "weights (method), or each task's own (task).",
        rich_help_panel=_TENSORS,
    ),
]
VocabularyFlag = Annotated[
    Vocabulary | None,
    typer.Option(
        "--vocabulary",
        help="Where an expert's vocabulary grew: refuse (the default), or merge the rows that all share.",
        rich_help_panel=_TENSORS,
    ),
]
Tests = Annotated[
    list[str] | None,
    typer.Option(
        "--test",
        metavar="NAME=FILE",
        help="Labelled data of one task to score on; may be repeated.",
        rich_help_panel=DATA,
    ),
]
TaskKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="NAME.KEY=VALUE",
        help="Another key of a task, as sst2.max_length=64; may be repeated.",
        rich_help_panel=DATA,
    ),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads; as many as torch uses when not given.")
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on standard output, and nothing else.")
]


def recipe_from(
    sources: Sequence[str], base: str | None, experts: Sequence[str], changes: dict[str, Any]
) -> Recipe:
    """The recipe that the arguments describe: a file with flags over it, or flags alone.

    Args:
        sources: the positional arguments.
        base: of `--base`.
        experts: of `--expert`.
        changes: keys of the recipe that flags give.

    Raises:
        UsageError: arguments that do not make one recipe.
    """
    from ..recipe import load_recipe, make_recipe

    rest = list(sources)
    file = rest.pop(0) if rest and _is_recipe(rest[0]) else None
    if file is None and base is None and rest:
        base = rest.pop(0)
        name, equals, path = base.partition("=")
        if equals and not Path(base).exists():
            raise UsageError(
                f"the first argument is the base, and '{base}' names an expert; "
                f"write: BASE {name}={path} ..., or give --base"
            )
    if base is not None:
        changes["base"] = base
    if rest or experts:
        changes["experts"] = named([*rest, *experts])
    if file is not None:
        return load_recipe(file, changes)
    if "base" not in changes:
        raise UsageError("nothing to merge: give a recipe.yaml, or a base and experts as BASE NAME=PATH ...")
    return make_recipe({"experts": {}, **changes})


def _is_recipe(source: str) -> bool:
    return source.lower().endswith((".yaml", ".yml")) and not Path(source).is_dir()


def named(arguments: Sequence[str]) -> dict[str, str]:
    """Experts by name, from ``name=path`` or a path alone.

    Raises:
        UsageError: two have one name, or one has no name or no path.
    """
    experts: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            name, path = _own_name(argument), argument
        if not name or not path:
            raise UsageError(f"an expert is given as NAME=PATH, got '{argument}'")
        if name in experts:
            raise UsageError(
                f"two experts are named '{name}': {experts[name]} and {path}; give each a name of its own, "
                "as NAME=PATH"
            )
        experts[name] = path
    return experts


def _own_name(path: str) -> str:
    """What a path is called: its folder's name; of a hub id, the name without organisation and revision."""
    local = Path(path).expanduser()
    if not local.exists() and "#" in path:
        return path.rpartition("#")[2]  # of a task in a store: the task's
    if not local.exists():
        return path.rstrip("/").rpartition("/")[2].partition("@")[0]
    local = local.resolve()
    return local.name if local.is_dir() else local.stem if local.stem != "model" else local.parent.name


def pairs(arguments: Sequence[str], flag: str) -> dict[str, Any]:
    """``KEY=VALUE`` arguments as a mapping; values are read as YAML.

    Raises:
        UsageError: no ``=``, a key given twice, or a value that is no YAML.
    """
    result: dict[str, Any] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.strip()
        if not equals or not key:
            raise UsageError(f"{flag} takes NAME=VALUE, got '{argument}'")
        if key in result:
            raise UsageError(f"{flag} {key} is given twice: {result[key]!r} and {value}")
        result[key] = value_of(value, f"{flag} {key}")
    return result


def value_of(text: str, flag: str) -> Any:
    """A value as it would stand in a recipe.

    Raises:
        UsageError: no YAML.
    """
    import yaml

    from ..recipe import UniqueKeys

    try:
        return yaml.load(text, UniqueKeys)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        raise UsageError(f"{flag}: '{text}' cannot be read as a value ({problem})") from None


def method_of(arguments: Sequence[str]) -> Any:
    """The recipe's `method` from `--method` flags: one name, or a chain of names or ``{name: options}``."""
    items = [value_of(argument, "--method") for argument in arguments]
    items = [i if isinstance(i, (str, dict)) else text for i, text in zip(items, arguments, strict=True)]
    return items[0] if len(items) == 1 and isinstance(items[0], str) else items


def weights_of(arguments: Sequence[str]) -> Any:
    """The recipe's `weights` from `--weight` flags: one value for all, or by expert."""
    if len(arguments) == 1 and "=" not in arguments[0]:
        return value_of(arguments[0], "--weight")
    return pairs(arguments, "--weight")


def adapt_of(arguments: Sequence[str]) -> dict[str, Any]:
    """The recipe's `adapt` from `--adapt` flags: a preset's name, and settings as ``KEY=VALUE``.

    Raises:
        UsageError: two presets, or values that are none.
    """
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) > 1:
        raise UsageError(f"--adapt names two presets: {', '.join(names)}")
    rest = [argument for argument in arguments if "=" in argument]
    return {**({"preset": names[0]} if names else {}), **pairs(rest, "--adapt")}


def tasks_of(data: Sequence[str], test: Sequence[str], settings: Sequence[str]) -> dict[str, Any]:
    """The recipe's `tasks` from `--data NAME=FILE`, `--test NAME=FILE` and `--task NAME.KEY=VALUE`.

    Raises:
        UsageError: an argument of another form, or given twice.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for flag, key, arguments in (("--data", "adapt", data), ("--test", "evaluate", test)):
        for argument in arguments:
            name, equals, path = argument.partition("=")
            if not equals or not name or not path:
                raise UsageError(f"{flag} takes NAME=FILE, got '{argument}'")
            if key in tasks.setdefault(name, {}):
                raise UsageError(f"{flag} {name} is given twice: {tasks[name][key]} and {path}")
            tasks[name][key] = path
    for path, value in pairs(settings, "--task").items():
        name, dot, key = path.rpartition(".")
        if not dot:
            raise UsageError(f"--task takes NAME.KEY=VALUE, as sst2.max_length=64, got '{path}=...'")
        tasks.setdefault(name, {})[key] = value
    return tasks


def given(**values: Any) -> dict[str, Any]:
    """The flags that were given: not None and not an empty list; enums as their values."""
    return {
        key: [item.value if isinstance(item, Enum) else item for item in value]
        if isinstance(value, list)
        else value.value
        if isinstance(value, Enum)
        else value
        for key, value in values.items()
        if value is not None and value != []
    }
