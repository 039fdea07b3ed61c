"""What each task has of its own beside the merged body, surgery or a learned head: count, tell, write it."""

from __future__ import annotations

from collections.abc import Mapping

from ..output.folder import OutputFolder
from ..surgery import KIND as SURGERY
from ..surgery import PER_TASK, Operation, write_parts
from .heads import KIND as HEADS
from .heads import SAID, LearnedHead, write_learned
from .session import Session

Parts = Mapping[str, Operation] | Mapping[str, LearnedHead]
"""What each task has of its own, by task."""


def write_own(folder: OutputFolder, operations: Parts) -> dict[str, str]:
    """Write the tasks' own parts; sha256 by file name."""
    heads = {task: part for task, part in operations.items() if isinstance(part, LearnedHead)}
    others = {task: part for task, part in operations.items() if isinstance(part, Operation)}
    return write_learned(folder, heads) | write_parts(folder, others)


def kind_of(session: Session) -> str:
    """What kind of a part each task has of its own."""
    return HEADS if session.heads else SURGERY


def own_parameters(operations: Parts) -> int:
    """How many numbers the tasks' own parts hold."""
    return sum(operation.parameters for operation in operations.values())


def own_warnings(session: Session) -> list[str]:
    """What a reader should know of the tasks' own parts."""
    if session.heads:
        return [SAID]
    return [PER_TASK] if session.settings.surgery is not None else []
