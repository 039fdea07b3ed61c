"""Plain data → a typed record, or one error that lists everything wrong with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from .errors import AdamergingError, UsageError

M = TypeVar("M", bound=BaseModel)


def make(model: type[M], fields: Mapping[str, Any], where: str) -> M:
    """Validate fields as a pydantic model; every problem in one `UsageError`.

    Raises:
        UsageError: names each field, the value found, what is wrong, and for unknown keys the nearest known.
    """
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        raise UsageError(
            f"{where}:\n" + "\n".join(f"  - {_explain(model, item)}" for item in error.errors())
        ) from None


class Problems:
    """Gathers what is wrong here and there, so that all of it is said at once."""

    def __init__(self) -> None:
        self.found: list[AdamergingError] = []

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep the error that the block ends with, if any."""
        try:
            yield
        except AdamergingError as error:
            self.found.append(error)

    def refuse(self, what: str) -> None:
        """Raise what was gathered: one error as it is, several as one `UsageError`; nothing if there is none.

        Args:
            what: heading of several.
        """
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            said = "\n".join("  - " + str(error).replace("\n", "\n    ") for error in self.found)
            raise UsageError(f"{what}:\n{said}")


def _explain(model: type[BaseModel], problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _record_at(model, problem["loc"][:-1]).model_fields
        close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1, cutoff=0.4)
        return f"unknown key '{key}'" + (
            f", did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
        )
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key} (={problem['input']!r}): {message}" if key else message


def _record_at(model: type[BaseModel], path: Sequence[Any]) -> type[BaseModel]:
    """The innermost record that a path through fields, list items and keys of mappings leads into."""
    for part in path:
        if part in model.model_fields:
            model = next(_records(model.model_fields[part].annotation), model)
    return model


def _records(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _records(inner)


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint that a near one was meant, ``, did you mean 'a' or 'b'?``; empty where none is near."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.5)
    return f", did you mean {' or '.join(map(repr, close))}?" if close else ""
