"""How models are compared: the ``compare:`` section of a recipe, as data alone."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

_STRICT = ConfigDict(extra="forbid", strict=True)
Apply = Literal["evaluate", "both"]


class Entry(BaseModel):
    """One merged model of a comparison. Unset: a static merge by the method of the entry's own name."""

    model_config = _STRICT

    method: str | list[Any] | None = Field(None, description="As `method` of a recipe.")
    options: dict[str, Any] = Field({}, description="Options of the method.")
    scale: Any = Field(None, description="λ of a static merge; the method's default when unset.")
    adapt: str | dict[str, Any] | None = Field(
        None, description="Learn the coefficients: a preset's name, or settings as in a recipe."
    )
    batchnorm: Literal["recalibrate", "keep"] = Field(
        "recalibrate",
        description="BatchNorm statistics of a static merge: re-estimated on the adaptation data, or as "
        "merged.",
    )
    sweep: dict[str, list[Any]] = Field(
        {}, description="Settings to try, {scale: [0.2, 0.3]}, {options.density: [...]}, {adapt.lr: [...]}."
    )
    choose_on: Literal["val", "test"] = Field(
        "val",
        description="Labels that choose from the sweep: those of the adaptation data, or of the evaluation "
        "data itself (an oracle, and labelled as one).",
    )


class Shift(BaseModel):
    """Distribution shift: corrupted copies of the evaluation data."""

    model_config = _STRICT

    corruptions: list[str] | None = Field(
        None, description="Names of corruptions; all that fit the inputs when unset."
    )
    severities: list[int] = Field([1, 2, 3, 4, 5], description="From 1 to 5.")
    apply: Apply = Field(
        "evaluate", description="Corrupt the data to score on alone, or that to adapt to as well."
    )
    tasks: list[str] | None = Field(None, description="Tasks whose data is corrupted; all when unset.")
    seed: int = Field(0, ge=0, description="Seed of the corruptions.")


class Unseen(BaseModel):
    """Tasks that no expert saw: scored under a head fitted once on the base's features."""

    model_config = _STRICT

    tasks: dict[str, dict[str, Any]] = Field(
        {},
        description="Tasks without an expert, by name: `train` (labelled, for the probe), `evaluate`, and "
        "the keys of a task of the recipe.",
    )
    leave_out: list[list[str]] | int | None = Field(
        None,
        description="Splits of the tasks to leave out in turn, or m for every choice of m tasks.",
    )
    subsets: int | None = Field(
        None, ge=1, description="Random subsets of the experts of every size to merge; None for none."
    )
    probe_samples: int = Field(2000, ge=1, description="Most labelled samples that the probe is fitted on.")
    seed: int = Field(0, ge=0, description="Seed of the probe's sample and of the subsets.")


class CompareSettings(BaseModel):
    """The ``compare:`` section of a recipe."""

    model_config = _STRICT

    methods: list[str | dict[str, Entry | None]] = Field(
        [],
        description="What to compare: methods or presets of adaptation, or {label: settings}.",
    )
    models: dict[str, str | dict[str, str]] = Field(
        {},
        description="Models made elsewhere, scored beside the merged ones: {label: folder}, or "
        "{label: {task: folder}}.",
    )
    seeds: list[int] = Field([0], min_length=1, description="A learned or random method runs once a seed.")
    limit: int | None = Field(None, ge=1, description="Score on the first so many samples of each task.")
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        "float32",
        description="Of the forward passes that are scored; auto: bfloat16 where it is fast. All rows alike.",
    )
    bootstrap: int = Field(1000, ge=0, description="Resamples behind the 95 % intervals.")
    shift: Shift | None = Field(None, description="Score under distribution shift too.")
    unseen: Unseen | None = Field(None, description="Score on tasks that no expert saw too.")
    why: bool = Field(True, description="Measure what explains the result: conflicts, entropy, confusion.")
    slice_tasks: list[str] | None = Field(
        None, min_length=2, max_length=2, description="Two tasks whose coefficients span the loss surface."
    )
