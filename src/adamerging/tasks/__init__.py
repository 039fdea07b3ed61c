"""What a task is, and the kinds there are. One file a kind, loaded when asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import names_from

if TYPE_CHECKING:
    from .data import read_samples, refuse_overlap
    from .image_classification import image_task
    from .module import module_task
    from .resolve import make_task, make_tasks
    from .spec import TaskSpec
    from .task import Inputs, Samples, Task
    from .text_classification import embedding_text_task, text_task
    from .zero_shot_image import zero_shot_image_task

_HOME = {
    "Inputs": "task",
    "Samples": "task",
    "Task": "task",
    "TaskSpec": "spec",
    "embedding_text_task": "text_classification",
    "image_task": "image_classification",
    "make_task": "resolve",
    "make_tasks": "resolve",
    "module_task": "module",
    "read_samples": "data",
    "refuse_overlap": "data",
    "text_task": "text_classification",
    "zero_shot_image_task": "zero_shot_image",
}

__all__ = [
    "Inputs",
    "Samples",
    "Task",
    "TaskSpec",
    "embedding_text_task",
    "image_task",
    "make_task",
    "make_tasks",
    "module_task",
    "read_samples",
    "refuse_overlap",
    "text_task",
    "zero_shot_image_task",
]


__getattr__ = names_from(__name__, _HOME)
