"""Names of a package that are loaded when they are asked for (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def names_from(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """What a package assigns to its ``__getattr__``.

    Args:
        package: its ``__name__``.
        home: the module in it that each of its names comes from.
    """

    def load(name: str) -> Any:
        if name in home:
            return getattr(import_module(f".{home[name]}", package), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load
