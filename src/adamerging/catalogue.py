"""The methods and the presets of learning as a reader sees them, told without importing torch.

A list of names must not take the seconds that torch takes to load. A method's file says all there is to
say: the decorator has name, paper, needs and cost, the signature has options, types and defaults, the
docstring the rest. A test holds this to what the registry says. What a preset needs, leaves and costs follows
from its settings.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import UsageError
from .validation import nearest

if TYPE_CHECKING:
    from .adaptation.settings import AdaptSettings

FOLDER = Path(__file__).parent / "methods"


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a method, or a setting that a preset fills in.

    Attributes:
        name: as it is called in a recipe.
        values: what it takes, in words.
        default: what it is when not given.
        help: what it does.
    """

    name: str
    values: str
    default: Any
    help: str


@dataclass(frozen=True, slots=True)
class Listing:
    """One method, or one preset of learning, as a reader sees it.

    Attributes:
        name: as it is called in a recipe.
        kind: ``method``, or ``preset`` of learning on unlabeled data.
        summary: what it does, in one line.
        details: more of it; may be empty.
        paper: citation, empty where there is none.
        needs: what it needs beside base and experts.
        leaves: what comes out.
        cost: what it takes.
        options: in the order of the source.
    """

    name: str
    kind: Literal["method", "preset"]
    summary: str
    details: str
    paper: str
    needs: str
    leaves: str
    cost: str
    options: tuple[Option, ...]


def catalogue() -> Mapping[str, Listing]:
    """Every method by name, sorted, and then every preset in its own order."""
    return {**methods(), **presets()}


def methods() -> Mapping[str, Listing]:
    """Every method by name, sorted."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.py"))]
    types = dict(pair for tree in trees for pair in _aliases(tree))
    found = [listing for tree in trees for listing in _listings(tree, types)]
    return {listing.name: listing for listing in sorted(found, key=lambda listing: listing.name)}


def presets() -> Mapping[str, Listing]:
    """Every preset of learning by name; its options are the settings that it fills in."""
    from .adaptation.presets import PRESETS
    from .adaptation.settings import AdaptSettings

    found = {}
    for name, preset in PRESETS.items():
        settings = AdaptSettings(preset=name, **preset.settings)
        options = tuple(
            Option(key, "", value, AdaptSettings.model_fields[key].description or "")
            for key, value in preset.settings.items()
        )
        found[name] = Listing(
            name, "preset", preset.summary, "", preset.paper, _needs(settings), _leaves(settings),
            _cost(settings), options,
        )  # fmt: skip
    return found


def find(name: str) -> Listing:
    """One method or preset.

    Raises:
        UsageError: there is none of this name; the nearest names are given.
    """
    known = catalogue()
    if name not in known:
        raise UsageError(f"unknown method '{name}'{nearest(name, known)}; there are: {', '.join(known)}")
    return known[name]


def _aliases(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """Names that a file gives to types: ``Fraction = Annotated[...]``."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _listings(tree: ast.Module, types: Mapping[str, ast.expr]) -> Iterator[Listing]:
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register":
                name = ast.literal_eval(call.args[0])
                told = {k.arg: ast.literal_eval(k.value) for k in call.keywords}
                text, _, after = (ast.get_docstring(node) or "").partition("\nArgs:\n")
                summary, _, details = text.strip().partition("\n")
                helps = _helps(after)
                options = tuple(
                    Option(
                        argument.arg,
                        _in_words(argument.annotation, types),
                        ast.literal_eval(default),
                        helps.get(argument.arg, ""),
                    )
                    for argument, default in zip(node.args.args, node.args.defaults, strict=True)
                )
                yield Listing(
                    name, "method", summary, _joined(details), told.get("paper", ""),
                    told.get("needs", "nothing"), told.get("leaves", "one model"),
                    told.get("cost", "one pass"), options,
                )  # fmt: skip


def _needs(settings: AdaptSettings) -> str:
    data = "labelled" if settings.objective == "supervised" else "unlabeled"
    named = ", and the task's name at inference" if settings.surgery is not None else ""
    return f"{data} data of every task{named}"


def _leaves(settings: AdaptSettings) -> str:
    if settings.surgery is not None:
        return "one model, and a small module for each task"
    if settings.heads == "learned":
        return "one model, and a learned head for each task"
    return "one model" if settings.route is None else "a model that mixes parts of itself for every input"


def _cost(settings: AdaptSettings) -> str:
    """What is done to the data, in order."""
    from .adaptation.layerwise_settings import asked_for

    distill, parts = asked_for(settings.start), []
    if distill is not None:
        parts.append(f"{distill.epochs} epochs of {distill.samples} inputs a task, block by block")
    if settings.mask is not None:
        parts.append(f"{settings.mask.steps:,} steps of two batches each for the mask")
    if settings.route == "twin":
        parts.append("a decomposition of each matrix for each expert")
    if settings.steps:
        each = f" of {settings.batches_per_step} batches each" if settings.batches_per_step > 1 else ""
        stored = " on stored features" if settings.route == "twin" else ""
        parts.append(f"{settings.steps:,} steps{each}{stored}")
    if settings.surgery is not None:
        parts.append(f"{settings.surgery.steps} steps on stored features")
    return ", then ".join(parts)


def _helps(section: str) -> dict[str, str]:
    """The ``Args`` of a docstring: name → text."""
    section = re.split(r"\n\S", section)[0]
    parts = re.split(r"^ {4}(\w+): ", section, flags=re.MULTILINE)
    return {name: _joined(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def _joined(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


_PLAIN = {
    "float": "number",
    "int": "integer",
    "bool": "true | false",
    "str": "text",
    "None": "none",
    "Any": "number",
}


def _in_words(node: ast.expr | None, types: Mapping[str, ast.expr]) -> str:
    """A type annotation as a reader would say it; what is not known stays as it is written."""
    if isinstance(node, ast.Name) and node.id in types:
        return _in_words(types[node.id], types)
    if isinstance(node, (ast.Name, ast.Constant)):
        text = str(node.id if isinstance(node, ast.Name) else node.value)
        return _PLAIN.get(text, text)
    if isinstance(node, ast.BinOp):
        return f"{_in_words(node.left, types)} | {_in_words(node.right, types)}"
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Literal":
            return " | ".join(str(ast.literal_eval(part)) for part in parts)
        if node.value.id in ("list", "tuple", "Sequence"):
            return f"list of {_in_words(parts[0], types)}"
        if node.value.id == "Annotated":
            limits = " ".join(filter(None, map(_limits, parts[1:])))
            return f"{_in_words(parts[0], types)} {limits}".strip()
    return ast.unparse(node) if node is not None else ""


def _limits(node: ast.expr) -> str:
    """What a validator allows: of ``Field(ge=…)`` and of ``_within(low, high)``."""
    if not isinstance(node, ast.Call):
        return ""
    words = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg in words}
    for arg, value in zip(("ge", "le"), node.args, strict=False):
        found[arg] = ast.literal_eval(value)
    found = {arg: value for arg, value in found.items() if value is not None}
    if set(found) == {"ge", "le"}:
        return f"{found['ge']:g}…{found['le']:g}"
    return ", ".join(f"{words[arg]} {value:g}" for arg, value in found.items())
