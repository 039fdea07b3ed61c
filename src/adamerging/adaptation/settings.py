"""How coefficients are learned: one typed record, which `presets` fill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from ..errors import UsageError
from ..validation import make, nearest
from .layerwise_settings import asked_for
from .presets import PRESETS

if TYPE_CHECKING:
    from .objectives import Objective

Granularity = Literal["task", "block", "tensor", "row", "singular", "value"]


class MaskSettings(BaseModel):
    """How a mask over the task vectors is learned before the coefficients (Concrete, arXiv 2312.06173)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    steps: int = Field(
        2000, ge=0, description="Steps in which the mask is learned; two batches of each task."
    )
    lr: float = Field(1e-3, gt=0, description="Learning rate of the logits, by Adam.")
    temperature: float = Field(0.5, gt=0, description="Of the relaxed Bernoulli distribution.")
    initial: float = Field(0.0, description="First value of the logits.")
    kind: Literal["soft", "hard"] = Field(
        "soft", description="The mask in the end: sigmoid of the logits, or 1 where they are above 0."
    )
    logits: str | None = Field(None, description="File of logits of an earlier run (mask.safetensors).")


class SurgerySettings(BaseModel):
    """Settings of surgery on features. Defaults are the paper's (arXiv 2402.02705)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    rank: int = Field(16, ge=1, description="Width of the module between its two matrices.")
    steps: int = Field(500, ge=0, description="Iterations.")
    lr: float = Field(1e-3, gt=0, description="Adam's rate.")
    batch_size: int = Field(16, ge=1, description="Inputs of a task a step.")
    batches_per_step: int = Field(2, ge=1, description="Batches an iteration, each with a step of its own.")


class AdaptSettings(BaseModel):
    """Settings of adaptation. Defaults of the fields are those of the preset ``paper``."""

    model_config = ConfigDict(extra="forbid", strict=True)

    preset: str = Field(
        "recommended", description="Where unset fields come from: " + ", ".join(PRESETS) + "."
    )
    granularity: Granularity = Field(
        "tensor",
        description="What one coefficient covers: task, block, tensor (the paper's layer), or row; singular: "
        "a tensor, and each singular component of a matrix has a gate; value: no coefficients, every value "
        "of the merge at `start` learns.",
    )
    start: str | list[Any] | None = Field(
        None,
        description="A method whose merged vector joins the stack with coefficient 1 (tsv_m, ties, ...), or "
        "prodistill, which learns one block by block.",
    )
    vectors: str | list[Any] | None = Field(
        None,
        description="A method whose transform is applied to the task vectors first (ties for AdaMerging++).",
    )
    route: Literal["wemoe", "twin"] | None = Field(
        None, description="Learn routers that mix parts of the model for every input, not coefficients."
    )
    route_options: dict[str, Any] = Field({}, description="Options of the way to route.")
    initial: float = Field(
        0.3, description="First value of the experts' coefficients, and of routers' gates."
    )
    gated: Literal["blocks", "all"] = Field(
        "blocks", description="Matrices whose components have gates: those inside blocks, or all (singular)."
    )
    kept: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Part of a matrix's rank whose gates are open at the start (singular); all, or as "
        "`start` has it.",
    )
    gate: float = Field(
        0.1, gt=0, description="First distance of a gate from closing: gate / lr steps turn it (singular)."
    )
    heads: Literal["expert", "learned"] = Field(
        "expert",
        description="Each task's head: as the expert has it, or learned along with the coefficients.",
    )
    surgery: SurgerySettings | None = Field(
        None,
        description="Learn a small module for each task on the features before its head, after all else: "
        "rank, steps, lr, batch_size, batches_per_step. The result is no single model.",
    )
    coefficients: str | None = Field(
        None, description="File of coefficients of an earlier run to start from."
    )
    mask: MaskSettings | None = Field(
        None, description="Learn a mask that all task vectors share, before the coefficients."
    )
    clamp: Literal["forward", "project", "none"] = Field(
        "forward",
        description="Keep coefficients in [0, 1]: when used (paper), after each step, or not at all.",
    )
    objective: str = Field(
        "entropy",
        description="What is minimised: entropy, filtered_entropy, diverse_entropy, agreement, self_labels, "
        "supervised, or package.module:name of a function that makes one.",
    )
    objective_options: dict[str, Any] = Field({}, description="Options of the objective.")
    optimizer: str = Field("Adam", description="Name of a class in torch.optim.")
    optimizer_options: dict[str, Any] = Field(
        {}, description="Its further options (betas, weight_decay, ...)."
    )
    lr: float = Field(1e-3, gt=0, description="Learning rate.")
    schedule: Literal["constant", "cosine"] = Field("constant", description="Learning rate over the steps.")
    steps: int = Field(500, ge=0, description="Optimiser steps.")
    batch_size: int = Field(16, ge=1, description="Samples of each task in a batch.")
    batches_per_step: int = Field(
        1, ge=1, description="Batches of each task a step; their losses are summed."
    )
    group_by_length: bool = Field(False, description="Batch samples of similar length: less padding.")
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens of a batch, padding included, where batches are grouped by length.",
    )
    batch_most: int | None = Field(
        None,
        ge=1,
        description="Most samples of a batch that `batch_tokens` fills; batch_size when unset.",
    )
    seed: int = Field(0, ge=0, description="Seed of the data order.")
    held_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Part of the adaptation data kept out of the loss, to choose the state by.",
    )
    held_out_limit: int = Field(128, ge=1, description="Most held-out samples of each task.")
    check_every: int = Field(10, ge=1, description="Steps between checks on the held-out part.")
    keep: Literal["last", "best"] = Field(
        "last",
        description="The state returned: the last, or the best held-out agreement, the start included.",
    )
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        "float32",
        description="Of the forward pass; merged weights stay float32. auto: bfloat16 where it is fast.",
    )
    device: str = Field("cpu", description="Where the working model lives.")
    budget: float = Field(0.0, ge=0, description="GB that may hold the task vectors in memory on the device.")
    batchnorm_every: int = Field(
        10, ge=1, description="Steps between re-estimations of BatchNorm statistics."
    )
    batchnorm: Literal["recalibrate", "keep"] = Field(
        "recalibrate", description="BatchNorm statistics: re-estimated on the adaptation data, or as merged."
    )
    batchnorm_joint: bool = Field(
        True,
        description="Where common BatchNorm statistics are re-estimated, the tasks' batches run together and "
        "gradients go through the statistics. False takes them as constants, and less memory: activations of "
        "one task's batch at a time.",
    )
    save_every: int = Field(20, ge=1, description="Steps between saves of the state.")
    _objective: Objective | None = PrivateAttr(None)

    @property
    def own_objective(self) -> Objective | None:
        """The objective, where the caller gave one and no name; records have its name alone."""
        return self._objective


def _routed(settings: AdaptSettings, fields: Mapping[str, Any]) -> AdaptSettings:
    """The settings of a run that learns routers, without what is for coefficients alone."""
    from ..routing.settings import route_options

    useless = [
        key for key in ("granularity", "clamp", "coefficients") if fields.get(key) not in (None, "none")
    ]
    if useless:
        raise UsageError(
            f"adapt: {', '.join(useless)} is for coefficients; route: {settings.route} learns routers instead"
        )
    own = [f"heads: {settings.heads}"] if settings.heads != "expert" else []
    if own or settings.surgery is not None:
        raise UsageError(
            f"adapt: {' and '.join(own or ['surgery'])} gives each task a part of its own, and route: "
            f"{settings.route} finds the task of each input; ask for one of them"
        )
    if settings.route == "twin" and (idle := [key for key in ("objective", "keep") if key in fields]):
        raise UsageError(
            f"adapt: {', '.join(idle)} has no say with route: twin, whose router learns which task's data an "
            "input comes from"
        )
    route_options(settings.route or "", settings.route_options)
    return settings.model_copy(update={"granularity": "task", "clamp": "none", "coefficients": None})


def _name_of(own: Any) -> str:
    """The name of an objective that is given as such."""
    from .objectives import Objective

    if not isinstance(own, Objective):
        raise UsageError(
            f"objective must be a name or an adamerging.Objective, got {type(own).__name__}; wrap a function "
            "of outputs and target: Objective('mine', function)"
        )
    return own.name


def has_fast_bfloat16(device: str) -> bool:
    """Whether matrix products in bfloat16 run in hardware there."""
    import torch

    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device == "cpu" and supported is not None and bool(supported())


def _check_values(settings: AdaptSettings) -> None:
    """Refuse what has no meaning where every value learns by itself."""
    wrong = [] if settings.start is not None else ["start: is missing, the merge whose values learn"]
    wrong += [] if settings.clamp == "none" else [f"clamp: {settings.clamp} holds coefficients; use none"]
    wrong += [] if settings.vectors is None else ["vectors: is for coefficients of the experts' vectors"]
    wrong += [] if settings.mask is None else ["mask: multiplies task vectors, and none is left to multiply"]
    if wrong:
        raise UsageError("granularity: value has no coefficients:\n" + "\n".join(f"  - {w}" for w in wrong))


def settled_precision(asked: str, device: str) -> str:
    """``float32`` or ``bfloat16``, where ``auto`` may be asked for."""
    if asked != "auto":
        return asked
    return "bfloat16" if has_fast_bfloat16(device) else "float32"


def resolve(fields: Mapping[str, Any]) -> AdaptSettings:
    """The settings with unset fields filled from the preset.

    Args:
        fields: of `AdaptSettings`; the objective may be an `Objective` instead of a name.

    Raises:
        UsageError: unknown preset, unknown or unreadable fields, fields that exclude each other.
    """
    preset = fields.get("preset", "recommended")
    if preset not in PRESETS:
        hint = nearest(str(preset), PRESETS)
        raise UsageError(f"unknown preset '{preset}'{hint}; there are: {', '.join(PRESETS)}")
    own = fields.get("objective")
    if own is not None and not isinstance(own, str):
        fields = {**fields, "objective": _name_of(own)}
    filled = dict(PRESETS[preset].settings)
    if own not in (None, filled.get("objective")):
        filled.pop("objective_options", None)  # they are for the preset's own objective
    settings = make(AdaptSettings, {"preset": preset, **filled, **fields}, "adapt")
    if own is not None and not isinstance(own, str):
        settings._objective = own
    if settings.route is not None:
        settings = _routed(settings, fields)
    stray = [name for name in ("gated", "kept", "gate") if name in fields]
    if stray and settings.granularity != "singular":
        raise UsageError(
            f"{', '.join(stray)}: there are gates with granularity: singular alone, and it is "
            f"'{settings.granularity}'"
        )
    if settings.granularity == "value":
        _check_values(settings)
    if settings.mask is not None and settings.granularity == "singular":
        raise UsageError("mask: a mask over values and gates on singular components exclude each other")
    if settings.granularity == "singular" and asked_for(settings.start) is not None:
        raise UsageError(
            "granularity: singular opens and shuts components of task vectors or of a method's merge, and "
            "prodistill learns a merge that has none; take another start, or another granularity"
        )
    if settings.surgery is not None and settings.heads == "learned":
        raise UsageError(
            "surgery and heads: learned are two ways to give each task a part of its own; ask for one of them"
        )
    return settings.model_copy(update={"precision": settled_precision(settings.precision, settings.device)})
