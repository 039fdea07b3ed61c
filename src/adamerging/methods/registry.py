"""The table of merging methods: one registration each, everything else is read from it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, ValidationError, validate_call

from ..adaptation.presets import PRESETS
from ..errors import UsageError
from ..validation import nearest
from .stage import Method

Factory = Callable[..., Method]


@dataclass(frozen=True)
class Registration:
    """What is known of a method without running it.

    Attributes:
        name: as it is called in a recipe.
        factory: makes the `Method` from its options; checks them.
        summary: the first line of the factory's docstring.
        paper: citation, empty where there is none.
        options: name → (type as written, default).
        needs: what it needs beside base and experts.
        leaves: what comes out.
        cost: what it takes.
    """

    name: str
    factory: Factory
    summary: str
    paper: str
    options: Mapping[str, tuple[str, Any]]
    needs: str
    leaves: str
    cost: str


_METHODS: dict[str, Registration] = {}


def register(
    name: str, *, paper: str = "", needs: str = "nothing", leaves: str = "one model", cost: str = "one pass"
) -> Callable[[Factory], Factory]:
    """Register a factory under ``name``; its keyword arguments are the method's options.

    What else is said here is told by `adamerging methods`, and the contract suite holds the method to it: see
    `Registration`. A pass is a reading of base and experts.
    """

    def decorate(factory: Factory) -> Factory:
        if name in _METHODS:
            raise ValueError(f"a method named '{name}' is registered already")
        options = {
            parameter.name: (str(parameter.annotation), parameter.default)
            for parameter in inspect.signature(factory).parameters.values()
        }
        summary = (inspect.getdoc(factory) or "").split("\n")[0]
        checked = validate_call(config=ConfigDict(strict=True))(factory)
        _METHODS[name] = Registration(name, checked, summary, paper, options, needs, leaves, cost)
        return factory

    return decorate


def methods() -> Mapping[str, Registration]:
    """Every registered method by name, sorted."""
    return dict(sorted(_METHODS.items()))


def make_method(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """A method by its name and options.

    Raises:
        UsageError: unknown method (the nearest names are given), unknown option, option out of range.
    """
    options = options or {}
    if name not in _METHODS:
        if name in PRESETS:
            raise UsageError(
                f"'{name}' is no method but a preset of learning on the tasks' data: adapt: {name} "
                f"(--adapt {name})"
            )
        raise UsageError(
            f"unknown method '{name}'{nearest(name, _METHODS)}; `adamerging methods` lists them all"
        )
    known = _METHODS[name]
    unknown = [option for option in options if option not in known.options]
    if unknown:
        lines = [
            f"method '{name}' has no option '{option}'{nearest(option, known.options)}" for option in unknown
        ]
        raise UsageError("; ".join(lines) + f"; its options: {', '.join(known.options) or 'none'}")
    try:
        return known.factory(**options)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"])
            reason = problem.get("ctx", {}).get("error", problem["msg"].lower())
            lines.append(f"{name}: {where} (={problem['input']!r}): {reason}")
        raise UsageError("\n".join(lines)) from None
