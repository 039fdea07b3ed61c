"""The fine-tuning recipe: a base, the data of each task, and how to train, as one typed YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..errors import UsageError
from ..recipe import local, read_yaml
from ..tasks.spec import Kind, beside
from ..validation import make

_STRICT = ConfigDict(extra="forbid", strict=True)
R = TypeVar("R", bound="TrainingRecipe")
MULTITASK = "multitask"
"""Folder of the joint run beside the experts; no task may be called so."""


class LoraSettings(BaseModel):
    """Train a low-rank change (arXiv 2106.09685) in place of the weights."""

    model_config = _STRICT

    rank: int = Field(8, ge=1, description="Rank of the change.")
    alpha: float = Field(16.0, gt=0, description="The change is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the way into the change.")
    targets: list[str] | Literal["all-linear"] | None = Field(
        None, description="Ends of the names of the layers to adapt; those peft knows for the model if unset."
    )


class FinetuneSettings(BaseModel):
    """How one expert is trained."""

    model_config = _STRICT

    epochs: float = Field(2.0, gt=0, description="Passes over the training data; may be a fraction.")
    body_lr: float = Field(5e-5, gt=0, description="Peak learning rate of the body.")
    head_lr: float = Field(1e-3, gt=0, description="Peak learning rate of the new head.")
    batch_size: int = Field(32, ge=1, description="Samples a step.")
    max_length: int = Field(128, ge=1, description="Tokens kept of a text.")
    freeze: list[str] | None = Field(
        None,
        description="Patterns of parameter names that stay bit-identical to the base. Unset: the word "
        "embeddings of a text model, nothing of another; [] for none.",
    )
    head: Literal["together", "first"] = Field(
        "together", description="Train the head with the body, or alone first for `head_epochs`."
    )
    head_epochs: float = Field(1.0, gt=0, description="Epochs in which the head is trained alone.")
    warmup: float = Field(
        0.1, ge=0, lt=1, description="Share of the steps in which the rates rise, before they fall to zero."
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's, not applied to biases and norms.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    patience: int = Field(2, ge=1, description="Stop after so many epochs that were no better on val.")
    max_examples: int | None = Field(
        None, ge=1, description="Train on a random subset of so many samples, drawn by the seed."
    )
    seed: int = Field(0, ge=0, description="Seeds the new head, the order of the samples and dropout.")
    bf16: bool | Literal["auto"] = Field(
        "auto",
        description="Compute in bfloat16; weights and updates stay float32. auto: where it is fast.",
    )
    lora: LoraSettings | None = Field(None, description="Train a LoRA adapter instead of the weights.")
    batchnorm_momentum: float | None = Field(
        None, gt=0, le=1, description="Momentum of BatchNorm statistics in training; the model's if unset."
    )
    channels_last: bool = Field(False, description="Memory layout in which convolutions are fast.")


class FinetuneTask(BaseModel):
    """One task: what its expert learns, and from what."""

    model_config = _STRICT

    kind: Kind | None = Field(None, description="Told from the base's configuration when unset.")
    train: str = Field(description="Labelled data: a file, a folder, file.npz:split, or org/name:split.")
    val: str = Field(description="Labelled data that chooses the epoch.")
    test: str | None = Field(None, description="Labelled data to score the finished expert on.")
    input_field: str | None = Field(None, description="Column of the text, image or array.")
    label_field: str | None = Field(None, description="Column of the label.")
    pair_field: str | None = Field(None, description="Column of a second text (kind text).")
    label_names: list[str] | str | None = Field(
        None,
        description="Class names by number; or a JSON file with them, a list or an object with "
        "`label_names`. Found in the data when unset.",
    )
    templates: list[str] = Field(
        [],
        description="Kind text_embedding: texts with {} for the class's name; their embeddings are the head.",
    )
    scale: float = Field(30.0, gt=0, description="Kind text_embedding: logits are scale × cosine.")
    model: str | None = Field(None, description="Kind module: what makes the model, package.module:name.")
    model_options: dict[str, Any] = Field({}, description="Kind module: what `model` is called with.")
    collate: str | None = Field(None, description="Kind module: samples → batch, package.module:name.")
    forward: str | None = Field(
        None, description="Kind module: (module, batch) → logits, package.module:name."
    )
    settings: FinetuneSettings = Field(
        FinetuneSettings.model_construct(), description="Settings of this task, over the recipe's."
    )


def names_of_folders(tasks: dict[str, FinetuneTask]) -> dict[str, FinetuneTask]:
    """The tasks, whose names are names of folders too. Raises `ValueError` where one cannot be."""
    for name in tasks:
        if not name or name.startswith(".") or "/" in name or "\0" in name or name == MULTITASK:
            raise ValueError(f"'{name}' cannot be a task's name: it is the name of its folder")
    return tasks


class TrainingRecipe(BaseModel):
    """What is trained from which base: what every recipe with labelled data has."""

    model_config = _STRICT

    base: str = Field(description="The base: file, folder, or hub id.")
    out: str | None = Field(None, description="Folder of what is made.")
    tasks: Annotated[dict[str, FinetuneTask], Field(min_length=1)] = Field(description="By task name.")
    settings: FinetuneSettings = Field(
        FinetuneSettings.model_construct(), description="How every task is trained."
    )
    threads: int | None = Field(
        None, ge=1, description="Threads of a training; all cores divided by jobs if unset."
    )
    jobs: int = Field(1, ge=1, description="Trainings at the same time, in processes of their own.")
    device: str | None = Field(None, description="Such as cuda:0; cuda where there is one when unset.")
    overwrite: bool = Field(False, description="Replace trainings of an earlier run that differ.")

    _check_tasks = field_validator("tasks")(names_of_folders)

    def settings_of(self, name: str) -> FinetuneSettings:
        """The settings of one task: the recipe's, changed by its own."""
        return over(self.settings, self.tasks[name].settings)

    def together(self, own: bool | FinetuneSettings) -> FinetuneSettings:
        """The settings of a joint run: the recipe's, changed by its own."""
        none = FinetuneSettings.model_validate({})
        return over(self.settings, own if isinstance(own, FinetuneSettings) else none)


class FinetuneRecipe(TrainingRecipe):
    """Which experts to make from which base, each in out/<task>."""

    multitask: bool | FinetuneSettings = Field(
        False,
        description="Also train one body on all tasks jointly, the upper reference: true, or its settings "
        f"over the recipe's. Written to out/{MULTITASK}/<task>.",
    )


def over(general: FinetuneSettings, special: FinetuneSettings) -> FinetuneSettings:
    """Settings with those replaced that were given for the special case."""
    given = {**general.model_dump(exclude_unset=True), **special.model_dump(exclude_unset=True)}
    return FinetuneSettings.model_validate(given)


def load_finetune_recipe(
    path: str | Path, overrides: Mapping[str, Any] | None = None, tasks: list[str] | None = None
) -> FinetuneRecipe:
    """Read a fine-tuning recipe; paths in it are relative to its folder.

    Args:
        path: the YAML file.
        overrides: fields that replace the file's, taken as they are.
        tasks: keep these tasks alone.

    Raises:
        UsageError: not readable, unknown keys (the nearest known one is named), values of the wrong kind, or
            no such task; all in one message.
    """
    return load_training_recipe(FinetuneRecipe, path, overrides, tasks)


def load_training_recipe(
    kind: type[R], path: str | Path, overrides: Mapping[str, Any] | None, tasks: list[str] | None
) -> R:
    """A recipe of a kind that trains tasks. Arguments and errors as of `load_finetune_recipe`."""
    path = Path(path)
    fields = read_yaml(path)
    files_beside(path, fields)
    return keep(make(kind, {**fields, **(overrides or {})}, str(path)), tasks)


def keep(recipe: R, tasks: list[str] | None) -> R:
    """The recipe with some of its tasks. Raises `UsageError` for those it lacks."""
    if not tasks:
        return recipe
    unknown = [name for name in tasks if name not in recipe.tasks]
    if unknown:
        raise UsageError(f"no task {', '.join(unknown)} in the recipe; it has {', '.join(recipe.tasks)}")
    return recipe.model_copy(update={"tasks": {name: recipe.tasks[name] for name in tasks}})


def files_beside(recipe: Path, fields: dict[str, Any]) -> None:
    """Take base, output and data from the recipe's folder where they are named without one."""
    if isinstance(fields.get("base"), str):
        fields["base"] = local(recipe, fields["base"])
    if isinstance(fields.get("out"), str):
        fields["out"] = str(recipe.parent / Path(fields["out"]).expanduser())
    tasks = fields.get("tasks")
    for task in tasks.values() if isinstance(tasks, dict) else ():
        for key in ("train", "val", "test", "label_names"):
            if isinstance(task, dict) and isinstance(task.get(key), str):
                task[key] = beside(recipe.parent, task[key])
