"""The sharing recipe: that of fine-tuning, and what decides which layers a task gets of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..finetuning.settings import FinetuneSettings, TrainingRecipe, load_training_recipe

_STRICT = ConfigDict(extra="forbid", strict=True)


class TapsSettings(BaseModel):
    """Gated layers and their price (TAPS, arXiv 2203.16708)."""

    model_config = _STRICT

    penalty: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=False,
        description="λ: the loss grows by λ times the layers' mean |score|. At 0 every layer stays open.",
    )
    count: Literal["layers", "parameters"] = Field(
        "layers", description="Every layer counts alike (the paper), or by its number of parameters."
    )
    penalty_from: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of the steps before the penalty begins; the paper: 1 in 15.",
    )
    score_lr: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate of the scores. Unset: 1 / steps, so that a score can travel by "
        "0.5 in a training of any length.",
    )
    threshold: float = Field(
        0.1, gt=0, description="τ: a layer is a task's own where its score is that high."
    )
    initial: float = Field(0.15, description="Score that every layer starts with.")
    include: list[str] = Field([], description="Gate only layers whose name matches one of these patterns.")
    exclude: list[str] = Field([], description="Layers matching one of these patterns stay the base's.")
    small: Literal["task", "gate"] = Field(
        "task",
        description="Biases, norms and BatchNorm statistics: each task's own, or tied to a layer's gate.",
    )

    @model_validator(mode="after")
    def _open_at_first(self) -> TapsSettings:
        if self.initial < self.threshold:
            raise ValueError(
                f"initial (={self.initial}) is below threshold (={self.threshold}): every layer would start "
                "closed, and a closed layer whose change is zero never learns"
            )
        return self


class SweepSettings(BaseModel):
    """Several penalties, and how one is chosen for each task."""

    model_config = _STRICT

    penalty: Annotated[list[float], Field(min_length=1)] = Field(description="Penalties to try.")
    tolerance: float = Field(
        0.005,
        ge=0,
        description="A task takes the fewest parameters whose val accuracy is within this of its best.",
    )

    @field_validator("penalty")
    @classmethod
    def _once_each(cls, penalties: list[float]) -> list[float]:
        wrong = [p for p in penalties if not 0 <= p < float("inf")]
        if wrong or len(set(penalties)) < len(penalties):
            raise ValueError(f"penalties are numbers from 0, each given once, got {penalties}")
        return penalties


class ShareRecipe(TrainingRecipe):
    """Which tasks share which base. The store is written to out, the trainings beside it to out.tasks."""

    gates: TapsSettings = Field(
        TapsSettings.model_construct(), description="Which layers are gated, and their price."
    )
    sweep: SweepSettings | None = Field(None, description="Train with several penalties, and choose.")
    joint: bool | FinetuneSettings = Field(
        False,
        description="First train the base on all tasks jointly, then share that one: true, or the settings "
        "of the joint training over the recipe's.",
    )

    @field_validator("tasks")
    @classmethod
    def _no_joint(cls, tasks: dict[str, Any]) -> dict[str, Any]:
        if JOINT in tasks:
            raise ValueError(
                f"'{JOINT}' cannot be a task's name: it is the name of the joint training's folder"
            )
        return tasks

    @model_validator(mode="after")
    def _whole_weights(self) -> ShareRecipe:
        every = [self.settings, *(task.settings for task in self.tasks.values())]
        if any(settings.lora is not None for settings in every):
            raise ValueError("lora and gates exclude each other: a gated layer's change is a whole one")
        return self

    def penalties(self) -> list[float]:
        """Those that are tried."""
        return [self.gates.penalty] if self.sweep is None else self.sweep.penalty

    @property
    def tolerance(self) -> float:
        """See `SweepSettings.tolerance`."""
        return 0.0 if self.sweep is None else self.sweep.tolerance


JOINT = "joint"
"""Folder of the joint training."""


def load_share_recipe(
    path: str | Path, overrides: Mapping[str, Any] | None = None, tasks: list[str] | None = None
) -> ShareRecipe:
    """Read a sharing recipe; paths in it are relative to its folder.

    Args:
        path: the YAML file.
        overrides: fields that replace the file's, taken as they are.
        tasks: keep these tasks alone.

    Raises:
        UsageError: not readable, a task given twice, unknown keys (the nearest known one is named), values
            of the wrong kind, or no such task; all in one message.
    """
    return load_training_recipe(ShareRecipe, path, overrides, tasks)
