"""Everything this package raises on purpose.

    AdamergingError
    ├── UsageError            a recipe, option or argument that cannot be right      exit 2
    │   └── MissingExtraError an optional dependency that this call needs            exit 2
    ├── WeightsError          a file, folder or hub id that cannot be opened         exit 3
    │   └── UnsafeFileError   opening it would run code stored in it                 exit 3
    ├── PlanError             base and experts do not belong together                exit 4
    ├── NonFiniteError        NaN or infinity in weights that were to be merged      exit 5
    └── OutputError           the result cannot be written where it was asked        exit 6

Each message says what is wrong, where, and what to do. The command line prints it and ends with
``exit_code``; a traceback there is a bug.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class AdamergingError(Exception):
    """Root of the tree; catch it to catch everything this package raises on purpose."""

    exit_code = 1


class UsageError(AdamergingError):
    """A recipe, option or argument that cannot be right."""

    exit_code = 2


class MissingExtraError(UsageError):
    """An optional dependency is needed and not installed; the message names the extra."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}', which is not installed. "
            f"Install it with: pip install 'adamerging[{extra}]'"
        )
        self._given = (package, extra, purpose)

    def __reduce__(self) -> tuple[Any, ...]:
        """By what it was made of: it goes from one process to another."""
        return type(self), self._given


class WeightsError(AdamergingError):
    """A file, folder or hub id that cannot be opened as weights."""

    exit_code = 3


class UnsafeFileError(WeightsError):
    """Opening the file would execute code stored in it; it was not opened."""


class PlanError(AdamergingError):
    """Base and experts do not belong together. Lists every mismatch, not only the first.

    Args:
        problems: one line each: what, where, shapes and files.
        remedy: what the reader may do about them.
    """

    exit_code = 4

    def __init__(self, problems: Iterable[str], remedy: str = "") -> None:
        self.problems = tuple(problems)
        self.remedy = remedy
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        lines = [f"these weights cannot be merged as they are ({head}):"]
        lines += [f"  - {problem}" for problem in self.problems]
        if remedy:
            lines.append(remedy)
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        """By what it was made of: it goes from one process to another."""
        return type(self), (self.problems, self.remedy)


class NonFiniteError(AdamergingError):
    """NaN or infinity in weights that were to be merged."""

    exit_code = 5


class OutputError(AdamergingError):
    """The result cannot be written where it was asked."""

    exit_code = 6
