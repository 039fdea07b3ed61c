"""Presets: ways to learn by name, each with what it is, where it comes from, and the settings it fills in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_IN_MINUTES: Mapping[str, Any] = {
    "objective": "agreement",
    "schedule": "cosine",
    "steps": 60,
    "group_by_length": True,
    "batch_tokens": 1024,
    "check_every": 20,
    "held_out": 0.2,
    "keep": "best",
    "precision": "auto",
    "clamp": "none",
}
"""Few and large steps by agreement, the best held-out state kept: minutes on a processor."""

_ROWS: Mapping[str, Any] = {
    "granularity": "row",
    "start": [{"wudi": {"matrices": "all"}}],
    "initial": 0.0,
    "lr": 0.03,
    "batch_most": 64,
    "objective_options": {"temperature": 2.0},
}
"""A coefficient for every row of every expert on top of a WUDI merge, by softened predictions."""

_AS_IT_STARTS: Mapping[str, Any] = {
    "granularity": "task",
    "initial": 0.0,
    "clamp": "none",
    "objective": "agreement",
    "steps": 0,
    "group_by_length": True,
    "precision": "auto",
}
"""No coefficients are learned on top of the start."""

_ADAMERGING = "Yang et al., AdaMerging, 2024, arXiv 2310.02575"
_CONCRETE = "Tang et al., Concrete Subspace Learning, 2023, arXiv 2312.06173"
_ADARANK = "Lee et al., AdaRank, 2025, arXiv 2503.22178"
_PRODISTILL = "Xu et al., Progressive layer-wise distillation (ProDistill), 2025, arXiv 2502.12706"
_SYMERGE = "Jung et al., SyMerge, 2024, arXiv 2412.19098"
_WEMOE = "Tang et al., Weight-Ensembling Mixture of Experts, 2024, arXiv 2402.00433"


@dataclass(frozen=True)
class Preset:
    """One way to learn.

    Attributes:
        summary: what it does, in one line.
        settings: fields of `AdaptSettings` that differ from their defaults, which are those of ``paper``.
        paper: citation, empty where there is none.
    """

    summary: str
    settings: Mapping[str, Any]
    paper: str = ""


PRESETS: Mapping[str, Preset] = {
    "recommended": Preset(
        "A coefficient for every row of every expert on top of a WUDI merge, by agreement with the experts.",
        {**_IN_MINUTES, **_ROWS, "steps": 80},
    ),
    "thorough": Preset(
        "As recommended, with three times the steps.",
        {**_IN_MINUTES, **_ROWS, "steps": 240},
    ),
    "distilled": Preset(
        "Every value of a WUDI merge learns from the experts' predictions: the most accurate with much data.",
        {**_IN_MINUTES, **_ROWS, "granularity": "value", "lr": 1e-4, "steps": 240},
        "Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531",
    ),
    "paper": Preset("AdaMerging as the paper describes it: tensor-wise, by entropy.", {}, _ADAMERGING),
    "released": Preset(
        "AdaMerging as its authors' code has it: two batches of each task a step, their losses summed.",
        {"batches_per_step": 2},
        _ADAMERGING,
    ),
    "paper++": Preset(
        "AdaMerging++: on the trimmed and sign-elected vectors of TIES, not averaged.",
        {"vectors": "ties"},
        _ADAMERGING,
    ),
    "fusionbench": Preset(
        "AdaMerging with FusionBench's settings for CLIP.",
        {"steps": 1000, "clamp": "none"},
        "Tang et al., FusionBench, 2024, arXiv 2406.03280",
    ),
    "wemoe": Preset(
        "WEMoE: the MLPs mixed for every input by small routers, learned by entropy.",
        {"route": "wemoe", "steps": 1000, "clamp": "none"},
        _WEMOE,
    ),
    "wemoe_budget": Preset(
        "WEMoE within minutes on a processor, by agreement with the experts.",
        {"route": "wemoe", "lr": 3e-3, **_IN_MINUTES},
        _WEMOE,
    ),
    "twin": Preset(
        "Twin-Merging: a shared model and compressed differences, weighed by input.",
        {
            "route": "twin",
            "steps": 300,
            "schedule": "cosine",
            "clamp": "none",
            "held_out": 0.2,
            "check_every": 100,
        },
        "Lu et al., Twin-Merging, 2024, arXiv 2406.15479",
    ),
    "concrete": Preset(
        "Concrete AdaMerging: a mask that all task vectors share, learned first, then the coefficients.",
        {"steps": 1000, "clamp": "none", "mask": {}},
        _CONCRETE,
    ),
    "concrete_budget": Preset(
        "Concrete within minutes on a processor, by agreement with the experts.",
        {**_IN_MINUTES, "lr": 0.01, "steps": 40, "mask": {"steps": 30, "lr": 0.1}},
        _CONCRETE,
    ),
    "adarank": Preset(
        "AdaRank: a gate for each singular component, over task arithmetic or what `start` names.",
        {"granularity": "singular", "steps": 10_000, "clamp": "none"},
        _ADARANK,
    ),
    "adarank_budget": Preset(
        "AdaRank within minutes on a processor, by agreement with the experts.",
        {"granularity": "singular", "lr": 0.02, **_IN_MINUTES},
        _ADARANK,
    ),
    "prodistill": Preset(
        "ProDistill: a coefficient for every value, distilled from the experts block by block.",
        {"start": "prodistill", **_AS_IT_STARTS},
        _PRODISTILL,
    ),
    "prodistill_budget": Preset(
        "ProDistill within minutes on a processor: fewer epochs.",
        {"start": [{"prodistill": {"epochs": 20}}], **_AS_IT_STARTS},
        _PRODISTILL,
    ),
    "surgery": Preset(
        "Representation Surgery: a small module for each task before its head, over task arithmetic.",
        {"start": "task_arithmetic", "surgery": {}, **_AS_IT_STARTS},
        "Yang et al., Representation Surgery, 2024, arXiv 2402.02705",
    ),
    "symerge": Preset(
        "SyMerge: coefficients and heads together, from the classes that the experts predict.",
        {"objective": "self_labels", "heads": "learned", "lr": 1e-2, "batch_size": 32},
        _SYMERGE,
    ),
    "symerge_budget": Preset(
        "SyMerge within minutes on a processor: fewer steps, the best held-out state kept.",
        {**_IN_MINUTES, "objective": "self_labels", "heads": "learned", "lr": 1e-2, "clamp": "forward"},
        _SYMERGE,
    ),
}
