"""What a task is, and the kinds there are. One file a kind."""

from .data import read_samples, refuse_overlap
from .image_classification import image_task
from .module import module_task
from .resolve import TaskSpec, make_task, make_tasks
from .task import Inputs, Samples, Task
from .text_classification import embedding_text_task, text_task

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
]
