"""Merge experts fine-tuned from one base into one multi-task model, with no training data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import names_from

if TYPE_CHECKING:
    from .adaptation.adapt import AdaptResult, adapt
    from .adaptation.objectives import Objective
    from .errors import (
        AdamergingError,
        MissingExtraError,
        NonFiniteError,
        OutputError,
        PlanError,
        UnsafeFileError,
        UsageError,
        WeightsError,
    )
    from .evaluation.compare import compare
    from .evaluation.folder import evaluate
    from .plan import Plan, make_plan
    from .recipe import Recipe, load_recipe
    from .run import MergeResult, merge
    from .serving import MergedModel, export, load, load_module
    from .sharing.compress import compress
    from .sharing.run import ShareResult, share
    from .sharing.settings import ShareRecipe, load_share_recipe
    from .tasks import (
        Samples,
        Task,
        embedding_text_task,
        image_task,
        module_task,
        text_task,
        zero_shot_image_task,
    )
    from .weights import open_weights

__version__ = "0.1.0"

_HOME = {
    "AdaptResult": "adaptation.adapt",
    "adapt": "adaptation.adapt",
    "Objective": "adaptation.objectives",
    "AdamergingError": "errors",
    "MissingExtraError": "errors",
    "NonFiniteError": "errors",
    "OutputError": "errors",
    "PlanError": "errors",
    "UnsafeFileError": "errors",
    "UsageError": "errors",
    "WeightsError": "errors",
    "compare": "evaluation.compare",
    "evaluate": "evaluation.folder",
    "Plan": "plan",
    "make_plan": "plan",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "MergeResult": "run",
    "merge": "run",
    "MergedModel": "serving",
    "export": "serving",
    "load": "serving",
    "load_module": "serving",
    "compress": "sharing.compress",
    "ShareRecipe": "sharing.settings",
    "load_share_recipe": "sharing.settings",
    "ShareResult": "sharing.run",
    "share": "sharing.run",
    "Samples": "tasks",
    "Task": "tasks",
    "embedding_text_task": "tasks",
    "image_task": "tasks",
    "module_task": "tasks",
    "text_task": "tasks",
    "zero_shot_image_task": "tasks",
    "open_weights": "weights",
}

__all__ = [
    "AdamergingError",
    "AdaptResult",
    "MergeResult",
    "MergedModel",
    "MissingExtraError",
    "NonFiniteError",
    "Objective",
    "OutputError",
    "Plan",
    "PlanError",
    "Recipe",
    "Samples",
    "ShareRecipe",
    "ShareResult",
    "Task",
    "UnsafeFileError",
    "UsageError",
    "WeightsError",
    "adapt",
    "compare",
    "compress",
    "embedding_text_task",
    "evaluate",
    "export",
    "image_task",
    "load",
    "load_module",
    "load_recipe",
    "load_share_recipe",
    "make_plan",
    "merge",
    "module_task",
    "open_weights",
    "share",
    "text_task",
    "zero_shot_image_task",
]


__getattr__ = names_from(__name__, _HOME)  # importing the package must not load torch


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
