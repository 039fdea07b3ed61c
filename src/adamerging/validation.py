"""Plain data → a typed record, or one error that lists everything wrong with it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from .errors import AdamergingError, UsageError

M = TypeVar("M", bound=BaseModel)
_TYPES = {
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
}
"""Pydantic's names of a value that has another type, and what it must be."""


def make(model: type[M], fields: Mapping[str, Any], where: str) -> M:
    """Validate fields as a pydantic model; every problem in one `UsageError`.

    Raises:
        UsageError: names each field, the value found, what is wrong, and for unknown keys the nearest known.
    """
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        said = _explained(model, fields, error.errors())
        raise UsageError(f"{where}:\n" + "\n".join(f"  - {line}" for line in said)) from None


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


def _explained(model: type[BaseModel], fields: Mapping[str, Any], problems: Iterable[Any]) -> Iterator[str]:
    """A line for each place; of the types that a value may have, the one that fits it best is spoken of."""
    at: dict[tuple[Any, ...], list[Any]] = {}
    for problem in problems:
        at.setdefault(_place(model, fields, problem["loc"]), []).append(problem)
    for place, here in at.items():
        if not any(len(other) > len(place) and other[: len(place)] == place for other in at):
            yield _explain(model, place, here)


def _place(model: type[BaseModel], fields: Mapping[str, Any], path: Iterable[Any]) -> tuple[Any, ...]:
    """A path without what is neither in the data nor a field: pydantic's names for the types of a union."""
    place: list[Any] = []
    value: Any = fields
    for part in path:
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(part, int):
            value = value[part] if isinstance(value, list | tuple) and part < len(value) else None
        elif part == "[key]" or part in _record_at(model, place).model_fields:
            value = None
        else:
            continue
        place.append(part)
    return tuple(place)


def _explain(model: type[BaseModel], place: Sequence[Any], problems: Sequence[Any]) -> str:
    key, problem = ".".join(str(part) for part in place), problems[0]
    if problem["type"] == "extra_forbidden":
        known = _record_at(model, place[:-1]).model_fields
        close = difflib.get_close_matches(str(place[-1]), known, n=1, cutoff=0.4)
        return f"unknown key '{key}'" + (
            f", did you mean '{close[0]}'?" if close else f"; known: {', '.join(known)}"
        )
    if problem["type"] == "missing":
        return f"'{key}' is missing"
    message = _message(place, problems)
    return f"{key} (={problem['input']!r}): {message}" if key else message


def _message(place: Sequence[Any], problems: Sequence[Any]) -> str:
    """What a value must be; how to write it where that is plain."""
    value, kinds = problems[0]["input"], {problem["type"]: None for problem in problems}
    listed = "list_type" in kinds and kinds.keys() <= {"list_type", "string_type"}
    one = isinstance(value, str) or (isinstance(value, Mapping) and len(value) == 1)
    if listed and one and isinstance(place[-1], str):
        return f"write a list: {place[-1]}: [{_written(value)}]"
    if not kinds.keys() <= _TYPES.keys():
        return "; or ".join(dict.fromkeys(each["msg"].removeprefix("Value error, ") for each in problems))
    wanted = " or ".join(dict.fromkeys(_TYPES[kind] for kind in kinds))
    return f"must be {wanted}" + (", NAME: PATH" if place[-1:] == ("experts",) else "")


def _written(value: Any) -> str:
    """A value as it stands inside a line of YAML."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    return value if isinstance(value, str) else json.dumps(value, default=str)


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
