"""Prompts of zero-shot classification: the names of the classes, and texts with a place for a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field

from ..errors import UsageError
from ..validation import make

DEFAULT_TEMPLATES = ("a photo of a {}.",)


class Prompts(BaseModel):
    """A file of prompts: YAML or JSON with these two keys."""

    model_config = ConfigDict(extra="forbid", strict=True)

    classes: list[str] = Field(min_length=2, description="Names of the classes by number.")
    templates: list[str] = Field(
        list(DEFAULT_TEMPLATES), min_length=1, description="Texts with {} where the class's name goes."
    )


@dataclass(frozen=True)
class Settled:
    """Class names and templates, from a file or given one by one.

    Attributes:
        classes: by number; None where nobody has said.
        templates: each with one ``{}``.
    """

    classes: tuple[str, ...] | None
    templates: tuple[str, ...]


def read_prompts(path: str | Path) -> Prompts:
    """The prompts of a file.

    Raises:
        UsageError: it cannot be read, or holds something else.
    """
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the prompts {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"the prompts {path} are no readable YAML: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"the prompts {path} must hold classes: [...] and templates: [...]")
    return make(Prompts, found, str(path))


def settle_prompts(
    task: str,
    path: str | Path | None,
    classes: Sequence[str] | None,
    templates: Sequence[str] | None,
) -> Settled:
    """The prompts of a task, from its file or from what was given; a thing that is given twice is refused.

    Raises:
        UsageError: as `read_prompts`; or a template that has not one place for the name.
    """
    if path is not None:
        given = {"label_names": classes, "templates": templates}
        twice = [key for key, value in given.items() if value is not None]
        if twice:
            raise UsageError(f"task '{task}': {' and '.join(twice)} and prompts exclude each other")
        read = read_prompts(path)
        classes, templates = read.classes, read.templates
    found = tuple(DEFAULT_TEMPLATES if templates is None else templates)
    check_templates(found)
    return Settled(None if classes is None else tuple(classes), found)


def check_templates(templates: Sequence[str]) -> None:
    """Raise `UsageError` unless each of some templates has one place for a class's name."""
    wrong = [template for template in templates if template.count("{}") != 1]
    if wrong:
        raise UsageError(f"a template has {{}} where the class's name goes, once; got {wrong[0]!r}")
    if not templates:
        raise UsageError("give one template or more, texts with {} where the class's name goes")


def fill_templates(classes: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """Every template filled with every class's name: a list of texts a class.

    Raises:
        UsageError: as `check_templates`.
    """
    check_templates(templates)
    return [[template.replace("{}", name) for template in templates] for name in classes]
