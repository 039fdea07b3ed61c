"""The recipe: everything a merge needs, as one typed YAML file.

Every field has a flag of the same name at the command line and a keyword of the same name in Python.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from . import mergekit
from .adaptation.presets import PRESETS
from .adaptation.settings import AdaptSettings
from .errors import UsageError
from .evaluation.settings import CompareSettings
from .tasks.spec import TaskSpec, beside
from .validation import make, nearest

DTYPES = ("float32", "float16", "bfloat16", "float64")
Allowance = Literal["unrelated", "nonfinite"]


class Settings(BaseModel):
    """How to merge: all of a recipe but what is merged and where it goes."""

    model_config = ConfigDict(extra="forbid", strict=True)

    method: str | list[str | dict[str, dict[str, Any] | None]] = Field(
        "task_arithmetic",
        description="A method's name, or a list of methods run one after the other on the same task vectors: "
        "a name, or {name: {option: value}}.",
    )
    options: dict[str, Any] = Field({}, description="Options of the method (of the last one of a list).")
    scale: Any = Field(
        None, description="λ that the merged task vector is multiplied with; the method's default when unset."
    )
    weights: Any = Field(
        1.0, description="Weight by expert; a number, {expert: weight}, by name or over depth."
    )
    include: list[str] = Field(
        [], description="Merge only tensors whose base name matches one of these patterns."
    )
    exclude: list[str] = Field([], description="Take tensors matching one of these patterns from the base.")
    heads: list[str] | None = Field(
        None,
        description="Patterns of tensors kept per task; found from the model class when unset, [] for none.",
    )
    buffers: Literal["average", "base", "method", "task"] = Field(
        "average",
        description="BatchNorm statistics: mean of the experts, the base's, merged like weights, or each "
        "task's own. With data the mean and the tasks' own are re-estimated.",
    )
    vocabulary: Literal["refuse", "shared"] = Field(
        "refuse", description="Experts whose vocabulary grew: refuse, or merge the rows that all share."
    )
    tokenizer: str = Field(
        "base", description="Tokenizer of the result: base, union, or the name of an expert."
    )
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = Field(
        None, description="Dtype of the merged weights; the base's when unset."
    )
    allow: list[Allowance] = Field(
        [],
        description="Go on in spite of: unrelated (not fine-tuned from this base, as it looks), nonfinite.",
    )
    threads: int | None = Field(None, ge=1, description="Threads; as many as torch uses when unset.")

    @field_validator("method")
    @classmethod
    def _one_method_an_item(cls, value: Any) -> Any:
        if isinstance(value, list):
            if not value:
                raise ValueError("the list of methods is empty")
            for item in value:
                if isinstance(item, dict) and len(item) != 1:
                    raise ValueError(
                        f"an item of the list names one method, got: {', '.join(item) or 'none'}"
                    )
        return value

    def chain(self) -> list[tuple[str, dict[str, Any]]]:
        """The methods with their options, in order."""
        items = [self.method] if isinstance(self.method, str) else self.method
        steps: list[tuple[str, dict[str, Any]]] = []
        for item in items:
            steps.extend(
                [(item, {})] if isinstance(item, str) else [(n, dict(o or {})) for n, o in item.items()]
            )
        name, options = steps[-1]
        steps[-1] = (name, {**options, **self.options})
        return steps


class Expert(BaseModel):
    """One expert of a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True)

    path: str = Field(description="File, folder, LoRA adapter folder, or hub id (org/name@revision).")
    weight: Any = Field(1.0, description="Its weight: a number, by name or over depth.")


class Recipe(Settings):
    """What is merged, how, and where the result goes."""

    base: str = Field(description="The base: file, folder, or hub id (org/name@revision).")
    experts: dict[str, Expert] = Field(description="Experts by task name: a path, or {path, weight}.")
    out: str | None = Field(None, description="Folder to write; it must not exist.")
    overwrite: bool = Field(False, description="Replace the output folder of an earlier run.")
    tasks: dict[str, TaskSpec] = Field(
        {}, description="Data by expert: unlabeled inputs to adapt to, labelled ones to score on."
    )
    adapt: AdaptSettings | None = Field(
        None, description="Learn the coefficients on the tasks' data: a preset's name, or settings."
    )
    transductive: bool = Field(
        False, description="The data to adapt to and to score on may overlap; the record says so."
    )
    compare: CompareSettings | None = Field(
        None, description="What `adamerging compare` compares, and how it scores."
    )
    _notes: tuple[str, ...] = PrivateAttr(())

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know about how the recipe came about (a translation from mergekit)."""
        return self._notes

    @field_validator("experts", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: {"path": item} if isinstance(item, str) else item for name, item in value.items()}
        return value

    @field_validator("adapt", mode="before")
    @classmethod
    def _preset_alone(cls, value: Any) -> Any:
        value = {"preset": value} if isinstance(value, str) else value
        preset = value.get("preset") if isinstance(value, dict) else None
        if isinstance(preset, str) and preset not in PRESETS:
            hint = nearest(preset, PRESETS)
            raise ValueError(f"there is no preset '{preset}'{hint}; presets: {', '.join(PRESETS)}")
        return value

    @model_validator(mode="after")
    def _one_way_to_merge(self) -> Recipe:
        if self.adapt is not None:
            said = static_beside_learning({key: getattr(self, key) for key in self.model_fields_set})
            if said:
                raise ValueError(said)
        return self

    def weights_by_expert(self) -> Any:
        """One schedule from `weights` and the experts' own.

        Raises:
            UsageError: both are given.
        """
        own = {name: expert.weight for name, expert in self.experts.items()}
        if all(weight == 1.0 for weight in own.values()):
            return self.weights
        if self.weights != 1.0:
            raise UsageError(
                "weights are given both under 'weights' and with the experts; give them in one place"
            )
        return own


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a recipe; paths in it are relative to its folder. Or a mergekit configuration, see `mergekit`.

    Args:
        path: the YAML file.
        overrides: fields that replace the file's (flags of the command line), see `override`; paths in them
            are taken as they are.

    Raises:
        UsageError: not readable, not YAML, a key given twice, unknown keys (the nearest known one is
            named), or values of the wrong kind; all in one message.
    """
    path = Path(path)
    fields = read_yaml(path)
    if mergekit.is_mergekit(fields):
        fields, notes = mergekit.translate(fields, str(path))
        recipe = make(Recipe, override(fields, overrides or {}), str(path))
        recipe._notes = tuple(notes)
        return recipe
    if isinstance(fields.get("base"), str):
        fields["base"] = local(path, fields["base"])
    if isinstance(fields.get("out"), str):
        fields["out"] = str(path.parent / Path(fields["out"]).expanduser())
    experts = fields.get("experts")
    if isinstance(experts, dict):
        for name, expert in experts.items():
            if isinstance(expert, str):
                experts[name] = local(path, expert)
            elif isinstance(expert, dict) and isinstance(expert.get("path"), str):
                expert["path"] = local(path, expert["path"])
    _data_beside(path, fields)
    return make(Recipe, override(fields, overrides or {}), str(path))


def make_recipe(fields: Mapping[str, Any]) -> Recipe:
    """A recipe from flags alone. Raises as `load_recipe`."""
    return make(Recipe, override({}, fields), "the arguments")


def override(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a recipe with some of them changed.

    A change replaces the field, with these exceptions. Options add to those of the same method; another
    method drops the options of the old one. Weights by expert change those experts' and leave the others'.
    Settings of `adapt` and of each task change one by one.
    """
    result = {**fields, **changes}
    if "adapt" in changes:
        result["adapt"] = {**_settings_of(fields.get("adapt")), **_settings_of(changes["adapt"])}
    if isinstance(changes.get("tasks"), Mapping) and isinstance(fields.get("tasks"), Mapping):
        old, new = fields["tasks"], changes["tasks"]
        result["tasks"] = {name: {**(old.get(name) or {}), **new.get(name, {})} for name in {**old, **new}}
    if "method" in changes:
        result["options"] = changes.get("options", {})
    elif isinstance(changes.get("options"), Mapping) and isinstance(fields.get("options"), Mapping):
        result["options"] = {**fields["options"], **changes["options"]}
    experts = result.get("experts")
    if "weights" in changes and isinstance(experts, Mapping):
        common = fields.get("weights", 1.0)
        old = common if isinstance(common, Mapping) else dict.fromkeys(experts, common)
        own = {n: e["weight"] for n, e in experts.items() if isinstance(e, Mapping) and "weight" in e}
        result["experts"] = {
            n: {k: v for k, v in e.items() if k != "weight"} if isinstance(e, Mapping) else e
            for n, e in experts.items()
        }
        if isinstance(changes["weights"], Mapping):
            result["weights"] = {**old, **own, **changes["weights"]}
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        UsageError: as `load_recipe`.
    """
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a readable YAML file: {error}") from None
    if not isinstance(fields, dict):
        raise UsageError(f"{path} must hold keys and values, such as 'base: path/to/base'")
    return fields


def local(recipe: Path, value: str) -> str:
    """A path that exists beside the recipe, else the value itself (a hub id, or a path to be reported)."""
    candidate = recipe.parent / Path(value).expanduser()
    if "#" in value and not candidate.exists() and Path(str(candidate).rpartition("#")[0]).exists():
        return str(candidate)  # a task of a store
    looks_local = value.startswith((".", "/", "~")) or value.endswith("/") or value.count("/") != 1
    return str(candidate) if candidate.exists() or (looks_local and not Path(value).is_absolute()) else value


def _data_beside(recipe: Path, fields: Mapping[str, Any]) -> None:
    """Take the data of the tasks, and coefficients to start from, from the recipe's folder where they are."""
    tasks, adapt = fields.get("tasks"), fields.get("adapt")
    for spec in tasks.values() if isinstance(tasks, dict) else ():
        for key in ("adapt", "evaluate", "tokenizer", "processor", "head", "prompts"):
            if isinstance(spec, dict) and key in spec:
                spec[key] = _each_beside(recipe.parent, spec[key])
    compare = fields.get("compare")
    if isinstance(compare, dict) and isinstance(compare.get("models"), dict):
        compare["models"] = {k: _each_beside(recipe.parent, v) for k, v in compare["models"].items()}
    unseen = compare.get("unseen") if isinstance(compare, dict) else None
    others = unseen.get("tasks") if isinstance(unseen, dict) else None
    for spec in others.values() if isinstance(others, dict) else ():
        for key in ("train", "adapt", "evaluate", "tokenizer", "processor", "head"):
            if isinstance(spec, dict) and key in spec:
                spec[key] = _each_beside(recipe.parent, spec[key])
    if isinstance(adapt, dict) and isinstance(adapt.get("coefficients"), str):
        adapt["coefficients"] = beside(recipe.parent, adapt["coefficients"])
    mask = adapt.get("mask") if isinstance(adapt, dict) else None
    if isinstance(mask, dict) and isinstance(mask.get("logits"), str):
        mask["logits"] = beside(recipe.parent, mask["logits"])


def _each_beside(folder: Path, source: Any) -> Any:
    """A path, a list of some, or paths by name, taken from the folder where they are."""
    if isinstance(source, dict):
        return {name: _each_beside(folder, path) for name, path in source.items()}
    if isinstance(source, list):
        return [_each_beside(folder, path) for path in source]
    return beside(folder, source) if isinstance(source, str) else source


def _settings_of(adapt: Any) -> Mapping[str, Any]:
    """The settings that an `adapt` section stands for: a preset's name may stand alone."""
    return {"preset": adapt} if isinstance(adapt, str) else adapt if isinstance(adapt, Mapping) else {}


class UniqueKeys(yaml.SafeLoader):
    """Safe YAML in which a key given twice is an error, not the last one winning silently.

    And in which ``1e-3`` is a number, as in YAML 1.2; the library's own rules make a text of it.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, f"a key must be a plain word, not {key}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


UniqueKeys.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def static_beside_learning(given: Mapping[str, Any]) -> str:
    """What to say of settings of a static merge where coefficients are learned; nothing without such.

    Args:
        given: what was set, by the fields of `Settings`.
    """
    found = [key for key in ("method", "options", "scale") if given.get(key) not in ({}, None)]
    if not found:
        return ""
    return (
        f"{', '.join(found)} and adapt exclude each other: with learned coefficients, a method is "
        "either where they start (adapt.start: tsv_m) or what is done to the task vectors first "
        "(adapt.vectors: ties); either may be a list of {name: options}"
    )
