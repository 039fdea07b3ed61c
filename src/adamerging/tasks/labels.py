"""Labels as class numbers: checked against the model's classes once these are known."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from ..errors import UsageError
from .task import Samples

_GENERIC = re.compile(r"LABEL_\d+")


class Checked(Sequence[int]):
    """Labels that are looked at when one is used."""

    def check(self) -> Sequence[int]:
        """The class numbers. Raises `UsageError` where there are none, or none that fit."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        return self.check()[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.check())


class NamedLabels(Checked):
    """Labels that a data set stores by name: class numbers as soon as the model says what its classes are.

    Args:
        names: one a sample.
        source: where they come from, for messages.
    """

    def __init__(self, names: Sequence[str], source: str) -> None:
        self.names, self.source = names, source
        self._numbers: list[int] | None = None
        self._problem = "no model has said yet which classes it has"

    def settle(self, classes: Sequence[str] | None) -> None:
        """Number the names by the model's classes; on a misfit the error comes when a label is used."""
        self._numbers, self._problem = None, ""
        if classes is None:
            self._problem = "the model does not name its classes"
            return
        numbers = {name: number for number, name in enumerate(classes)}
        folded: dict[str, int] = {}
        for name, number in numbers.items():
            key = _fold(name)
            folded[key] = -1 if key in folded else number
        found = {name: numbers.get(name, folded.get(_fold(name), -1)) for name in set(self.names)}
        unknown = sorted(name for name, number in found.items() if number < 0)
        if unknown:
            shown = ", ".join(map(repr, unknown[:5])) + (" ..." if len(unknown) > 5 else "")
            known = ", ".join(map(repr, list(classes)[:10])) + (" ..." if len(classes) > 10 else "")
            self._problem = f"{shown} are none of the model's classes ({known})"
            return
        self._numbers = [found[name] for name in self.names]

    def check(self) -> list[int]:
        """The class numbers.

        Raises:
            UsageError: the names are not, or not yet, those of the model's classes.
        """
        if self._numbers is None:
            raise UsageError(
                f"the labels of {self.source} are names, and {self._problem}. "
                "Give label_names: the names in the order of the model's outputs"
            )
        return self._numbers

    def __len__(self) -> int:
        return len(self.names)


class SpareLabels(Checked):
    """Labels of adaptation data, which few runs look at: what is wrong with them is said when one is used.

    Args:
        found: class numbers or names; or anything, one a sample, where they are neither.
        problem: why they are neither.
    """

    def __init__(self, found: Sequence[Any], problem: str = "") -> None:
        self.found, self.problem = found, problem
        self._misfit = ""

    def settle(self, width: int, names: Sequence[str] | None, where: str) -> None:
        """Compare them with a model's classes; on a misfit the error comes when a label is used."""
        if isinstance(self.found, NamedLabels):
            self.found.settle(names)
        elif not self.problem:
            self._misfit = _out_of_range(self.found, width, where)

    def check(self) -> Sequence[int]:
        """The class numbers.

        Raises:
            UsageError: they are none, or the model has no such classes.
        """
        if problem := self.problem or self._misfit:
            raise UsageError(problem)
        return self.found.check() if isinstance(self.found, NamedLabels) else self.found

    def __eq__(self, other: object) -> bool:
        return list(self) == other

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.found)


def usable(labels: Sequence[int] | None) -> Sequence[int] | None:
    """Labels that fit the model; None for those that do not: for what can do without them."""
    try:
        return labels.check() if isinstance(labels, Checked) else labels
    except UsageError:
        return None


def class_names(config: Mapping[str, Any] | None) -> list[str] | None:
    """The names of a configuration's classes by number; None where it only counts them (``LABEL_0``)."""
    found = (config or {}).get("id2label")
    if not isinstance(found, Mapping) or not found:
        return None
    by_number = {int(key): str(name) for key, name in found.items()}
    names = [by_number.get(number, "") for number in range(len(by_number))]
    return None if any(not name or _GENERIC.fullmatch(name) for name in names) else names


def settle(
    task: str,
    adapt: Samples | None,
    evaluate: Samples | None,
    width: int,
    names: Sequence[str] | None,
) -> None:
    """Check a task's labels against a head that has just become known.

    Labels of the adaptation data may be any (`SpareLabels`), as long as nobody uses them.

    Raises:
        UsageError: the head's width does not fit the names or the labels, or names that the model lacks.
    """
    if names is not None and len(names) != width:
        raise UsageError(f"task '{task}': {len(names)} label_names, but the head has {width} outputs")
    for which, samples in (("adapt", adapt), ("evaluate", evaluate)):
        if samples is None or samples.labels is None:
            continue
        where = f"task '{task}': {which} ({samples.source})"
        if isinstance(samples.labels, SpareLabels):
            samples.labels.settle(width, names, where)
        elif isinstance(samples.labels, NamedLabels):
            samples.labels.settle(names)
            if which == "evaluate":
                samples.labels.check()
        elif problem := _out_of_range(samples.labels, width, where):
            raise UsageError(problem)


def _out_of_range(labels: Sequence[int], width: int, where: str) -> str:
    """What is wrong with labels that a head has no output for; nothing where it has."""
    if max(labels) < width:
        return ""
    return (
        f"{where} has the label {max(labels)}, but the head has {width} outputs (0 to {width - 1}). "
        "Is this the expert of another task?"
    )


def _fold(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.strip().casefold())
