"""What methods must know of the tasks' unlabeled inputs: gathered by running the experts, kept on disk."""

from .gather import Gathering, check_tasks, gather, without_inputs

__all__ = ["Gathering", "check_tasks", "gather", "without_inputs"]
