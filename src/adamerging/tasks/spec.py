"""One entry of a recipe's ``tasks:``, as data alone: reading a recipe must not load a model's library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["text", "text_embedding", "image", "image_zero_shot", "module"]


class TaskSpec(BaseModel):
    """One task of a recipe."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: Kind | None = Field(
        None, description="What the inputs and the model are; told from the expert when unset."
    )
    adapt: str | Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="Unlabeled data: a file, a folder, file.npz:split, org/name:split; or a list of these.",
    )
    evaluate: str | None = Field(None, description="Labelled data for scores; disjoint from `adapt`.")
    input_field: str | None = Field(None, description="Column of the text, image or array.")
    label_field: str | None = Field(None, description="Column of the label.")
    pair_field: str | None = Field(None, description="Column of a second text (kind text).")
    label_names: list[str] | None = Field(None, description="Class names by number; the expert's when unset.")
    max_length: int | None = Field(None, ge=1, description="Tokens kept of a text.")
    tokenizer: str | None = Field(None, description="Folder of a tokenizer; the expert's when unset.")
    processor: str | None = Field(None, description="Folder of an image processor; the expert's when unset.")
    head: str | None = Field(
        None,
        description="Kinds text_embedding and image_zero_shot: safetensors file with one matrix "
        "(classes, width). "
        "Kind module: package.module:name.",
    )
    templates: list[str] | None = Field(
        None, description="Kind image_zero_shot: texts with {} for the class's name; their mean is the head."
    )
    prompts: str | None = Field(
        None, description="Kind image_zero_shot: YAML file with classes and templates, instead of these two."
    )
    model: str | None = Field(None, description="Kind module: what makes the model, package.module:name.")
    model_options: dict[str, Any] = Field({}, description="Kind module: what `model` is called with.")
    collate: str | None = Field(None, description="Kind module: samples → batch, package.module:name.")
    forward: str | None = Field(
        None, description="Kind module: (module, batch) → output, package.module:name."
    )
    feature_module: str | None = Field(
        None,
        description="Kind module: the submodule whose input are the features that unseen tasks are probed "
        "on; found when unset.",
    )


def beside(folder: Path | None, value: str | None) -> str | None:
    """A path that exists in a folder (a split behind a colon kept), else the value itself."""
    if folder is None or value is None:
        return value
    path = folder / Path(value).expanduser()
    plain = value.rpartition(":")[0] if ":" in value and not path.exists() else value
    return str(path) if plain and (folder / Path(plain).expanduser()).exists() else value
