"""What a comparison found, as plain records: computed once, and drawn by `adamerging.report`.

A run's folder holds ``comparison.json`` (one `Comparison` without its rows) and ``rows/*.json`` (one `Row`
each, written whole or not at all as they come), so that an interrupted run shows what there is.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT = 1
CLEAN = "clean"
BASE = "base"
AVERAGE = "average"
EXPERTS = "experts"
"""Label of the row that is each expert on its own task."""
_STRICT = ConfigDict(extra="forbid")

RowKind = Literal["base", "expert", "average", "static", "learned", "plain"]


def label_of_expert(name: str) -> str:
    """Label of an expert's row."""
    return f"expert: {name}"


class ScoreRecord(BaseModel):
    """One model on one task under one condition."""

    model_config = _STRICT

    task: str
    condition: str = Field(CLEAN, description="clean, or a corruption and its severity: gaussian_noise:3.")
    unseen: bool = Field(False, description="No expert behind this model saw the task.")
    samples: int
    accuracy: float
    accuracy_low: float = Field(description="Lower end of the bootstrap 95 % interval.")
    accuracy_high: float
    macro_f1: float
    ece: float = Field(description="Expected calibration error over 15 bins.")
    nll: float = Field(description="Mean negative log-likelihood, nats.")
    entropy: float = Field(description="Mean prediction entropy, nats.")
    normalised: float | None = Field(
        None,
        description="Accuracy / that of the task's expert under the same condition; of an unseen task / "
        "that of the base under the same head. None without one.",
    )


class Row(BaseModel):
    """One model: where it came from, what it cost, how good it is."""

    model_config = _STRICT

    label: str
    kind: RowKind = Field(description="plain: a model that was made elsewhere.")
    seed: int | None = None
    group: str | None = Field(
        None, description="Rows of one leave-out split or subset, 'leave out: a, b'; None for all experts."
    )
    experts: list[str] = Field([], description="Experts that were merged, or the one whose row this is.")
    chosen_on: Literal["val", "test"] | None = Field(
        None, description="Labels that chose its settings; 'test' is an oracle."
    )
    labelled: bool = Field(False, description="Its coefficients were learned from labels.")
    transductive: bool = Field(False, description="It adapted to inputs that it is scored on.")
    failed: str | None = Field(None, description="Why there are no scores.")
    warnings: list[str] = []
    settings: dict[str, Any] = Field({}, description="What it takes to make it again.")
    seconds: float | None = Field(None, description="Time to merge or learn, scores excluded.")
    memory: int | None = Field(None, description="Peak private memory of the process by then, bytes.")
    parameters: int | None = Field(None, description="Number of learned coefficients.")
    fingerprint: str | None = Field(None, description="sha256 over the model's weights.")
    key: str | None = Field(None, description="Hash of all that the row was computed from.")
    scores: list[ScoreRecord] = []
    history: list[dict[str, Any]] = Field([], description="Records of adaptation, step by step.")
    coefficients: dict[str, Any] | None = Field(
        None,
        description="{granularity, tasks, groups, blocks, values[task][group]}; of rows the mean a tensor.",
    )
    why: dict[str, Any] = Field(
        {}, description="{entropy_loss: {task: ...}, confusion: {task: ...}}, see `evaluation.diagnosis`."
    )


class TaskRecord(BaseModel):
    """What is known of a task."""

    model_config = _STRICT

    name: str
    kind: str | None = None
    classes: int | None = None
    label_names: list[str] = []
    adapt: str | None = None
    adapt_samples: int = 0
    evaluate: str | None = None
    evaluate_samples: int = 0
    unseen: bool = False


class Comparison(BaseModel):
    """A whole run."""

    model_config = _STRICT

    format: int = FORMAT
    title: str
    adamerging: str = Field(description="Version of the package.")
    created: str = Field(description="ISO date and time, UTC.")
    complete: bool = Field(False, description="Every row that was asked for is there.")
    planned: int = Field(0, description="Rows that were asked for.")
    order: list[str] = Field([], description="Names of the rows' files, in the order they were asked for.")
    base: str
    experts: dict[str, str]
    tasks: list[TaskRecord]
    settings: dict[str, Any] = {}
    versions: dict[str, str] = {}
    geometry: dict[str, Any] | None = Field(
        None, description="{tasks, norms, cosines[i][j], sign_conflicts[i][j]} of the task vectors."
    )
    slice: dict[str, Any] | None = Field(
        None, description="{tasks: [a, b], x, y, loss[i][j], entropy[i][j]} over two coefficients."
    )
    sharing: dict[str, Any] | None = Field(
        None,
        description="{tasks, layers, blocks, values[task][layer], base, parameters, multiple} of experts "
        "that are tasks of one store, see `sharing.layer_map`.",
    )
    rows: list[Row] = []
