"""Names and settings of the `compare:` section → the merged models to make."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..adaptation.presets import PRESETS
from ..adaptation.settings import AdaptSettings, resolve
from ..errors import UsageError
from ..methods import chain, make_method, methods
from ..methods.stage import Method
from ..recipe import Recipe, Settings, static_beside_learning
from ..validation import nearest
from .records import AVERAGE, BASE, EXPERTS, label_of_expert
from .settings import Entry

ALIASES: Mapping[str, str] = {"adamerging": "paper", "adamerging++": "paper++"}
"""Names of presets as the papers call them."""


@dataclass(frozen=True)
class Candidate:
    """One way to merge, settled.

    Attributes:
        settings: of a static merge, or of what learning works on.
        method: of a static merge; None where coefficients are learned.
        adapt: settings of learning; None for a static merge.
        tried: what a sweep changed.
        keeps_statistics: a static merge whose BatchNorm statistics stay as they are merged.
        seeded: another seed gives another model: something in it is random, and it names no seed itself.
    """

    settings: Settings
    method: Method | None
    adapt: AdaptSettings | None
    tried: Mapping[str, Any]
    keeps_statistics: bool = False
    seeded: bool = False

    @property
    def masked(self) -> bool:
        """Whether each task has weights of its own, by its mask."""
        return self.method is not None and self.method.masks is not None


@dataclass(frozen=True)
class Wanted:
    """A model of the comparison.

    Attributes:
        label: as the table calls it.
        entry: what was asked for.
        recipe: of which everything else comes.
    """

    label: str
    entry: Entry
    recipe: Recipe

    @property
    def row_label(self) -> str:
        """The same as its rows have it, which say whether the labels that are scored on chose."""
        oracle = self.entry.sweep and self.entry.choose_on == "test"
        return f"{self.label} (oracle)" if oracle else self.label

    @property
    def learned(self) -> bool:
        """Whether coefficients are learned."""
        return self.entry.adapt is not None

    @property
    def seed(self) -> int | None:
        """The seed that the entry itself names; one that does is made with no other."""
        own = self.entry.adapt if self.learned else self.entry.options
        return own.get("seed") if isinstance(own, Mapping) else None

    @property
    def plain_average(self) -> bool:
        """Whether it is the simple average, which every comparison has anyway."""
        if self.learned or self.entry.sweep or self.entry.batchnorm == "keep":
            return False
        (only,) = self.candidates()
        return only.settings.chain() == [("average", {})] and only.settings.scale is None

    def candidates(self, seed: int | None = None) -> list[Candidate]:
        """What the sweep asks to try, in its order; one candidate without a sweep.

        Args:
            seed: of everything random in it; as given where None.

        Raises:
            UsageError: a key that cannot be swept, unknown methods, options or settings.
        """
        sweep = self.entry.sweep
        empty = [key for key, values in sweep.items() if not values]
        if empty:
            raise UsageError(f"{self.label}: nothing to try for {', '.join(empty)}")
        found = []
        for values in itertools.product(*sweep.values()):
            tried = dict(zip(sweep, values, strict=True))
            found.append(_settle(self, self._changed(tried), tried, seed))
        return found

    def _changed(self, tried: Mapping[str, Any]) -> Entry:
        fields = self.entry.model_dump(exclude_unset=True, exclude={"sweep", "choose_on"})
        if isinstance(fields.get("adapt"), str):
            fields["adapt"] = {"preset": fields["adapt"]}
        for path, value in tried.items():
            section, dot, option = path.partition(".")
            if path == "scale":
                fields["scale"] = value
            elif section in ("options", "adapt") and dot:
                fields[section] = {**(fields.get(section) or {}), option: value}
            else:
                raise UsageError(
                    f"{self.label}: sweep takes scale, options.NAME and adapt.NAME, not '{path}'"
                )
        return Entry.model_validate(fields)


def wanted(recipe: Recipe, names: Sequence[str | Mapping[str, Entry | None]]) -> list[Wanted]:
    """The models that are asked for; without names the one that the recipe itself describes.

    A name is that of a method (a static merge), of a preset of adaptation, or ``adamerging`` for the preset
    ``paper``. Everything is settled once, so that what cannot be right is said before anything runs.

    Raises:
        UsageError: unknown names (the nearest is told), settings that cannot be right, a label given twice;
            all in one message.
    """
    if not names:
        names = [_own(recipe)]
    found: list[Wanted] = []
    problems = []
    for item in names:
        for label, entry in [(item, None)] if isinstance(item, str) else item.items():
            try:
                made = Wanted(label, _entry(label, entry, recipe.buffers), recipe)
                made.candidates(0)
                _check_label(made)
            except UsageError as error:
                problems.append(str(error))
                continue
            if any(other.row_label == made.row_label for other in found):
                problems.append(f"'{label}' is given twice; write {{another label: {{method: {label}}}}}")
            found.append(made)
    if problems:
        raise UsageError("what cannot be compared:\n" + "\n".join(f"  - {text}" for text in problems))
    return found


def _own(recipe: Recipe) -> Mapping[str, Entry | None]:
    """The recipe's own way to merge, as an entry."""
    if recipe.adapt is not None:
        fields = recipe.adapt.model_dump(exclude_unset=True)
        return {fields.get("preset", "recommended"): Entry(adapt=fields or {"preset": "recommended"})}
    label = "+".join(name for name, _ in recipe.chain())
    return {label: Entry(method=recipe.method, options=recipe.options, scale=recipe.scale)}


def _entry(label: str, entry: Entry | None, buffers: str) -> Entry:
    """An entry that names its method or its preset."""
    entry = entry or Entry()
    if entry.adapt is None and entry.method is None:
        name = ALIASES.get(label, label)
        if name in PRESETS:
            entry = entry.model_copy(update={"adapt": name})
        elif label in methods():
            entry = entry.model_copy(update={"method": label})
        else:
            known = [*methods(), *PRESETS, *ALIASES]
            raise UsageError(
                f"unknown method '{label}'{nearest(label, known)}; there are the methods of `adamerging "
                f"methods` and the presets {', '.join([*PRESETS, *ALIASES])}"
            )
    swept = {path.partition(".")[0]: values for path, values in entry.sweep.items()}
    if entry.adapt is not None:
        given = {"method": entry.method, "options": entry.options, "scale": entry.scale} | swept
        if said := static_beside_learning(given):
            raise UsageError(f"{label}: {said}")
    elif "adapt" in swept:
        raise UsageError(
            f"{label}: a sweep over adapt.NAME is for learned coefficients, and this is a static merge; say "
            "how they are learned, adapt: {preset: recommended}; a method is where they start, adapt: "
            "{start: ties}, or what is done to the task vectors first, adapt: {vectors: ties}"
        )
    if entry.adapt is not None and "batchnorm" in entry.model_fields_set:
        raise UsageError(
            f"{label}: batchnorm is for a static merge; say it among the settings of learning, "
            f"adapt: {{batchnorm: {entry.batchnorm}}}"
        )
    if entry.batchnorm == "keep" and buffers == "task":
        raise UsageError(f"{label}: batchnorm: keep does not go with buffers: task; leave out one of them")
    return entry


def _check_label(made: Wanted) -> None:
    """Refuse the label of a row that every comparison has.

    Raises:
        UsageError: it is that of the base, of an expert, of all experts, or of the simple average and
            stands for another merge.
    """
    if made.row_label == AVERAGE and made.plain_average:
        return
    if made.row_label in {BASE, AVERAGE, EXPERTS, *map(label_of_expert, made.recipe.experts)}:
        what = "of the simple average" if made.row_label == AVERAGE else "that every comparison has"
        raise UsageError(
            f"'{made.row_label}' is the name of the row {what}; call this merge otherwise, under "
            "compare.methods: {another label: {method: ...}}"
        )


def _settle(made: Wanted, entry: Entry, tried: Mapping[str, Any], seed: int | None) -> Candidate:
    recipe = made.recipe
    common = recipe.model_dump(include=set(Settings.model_fields) - {"method", "options", "scale", "weights"})
    try:
        if entry.adapt is not None:
            given = {"preset": entry.adapt} if isinstance(entry.adapt, str) else dict(entry.adapt)
            given["preset"] = ALIASES.get(given.get("preset", ""), given.get("preset", "recommended"))
            own = recipe.adapt.model_dump(exclude_unset=True) if recipe.adapt is not None else {}
            given = {key: own[key] for key in ("device", "budget") if key in own} | given
            adapt = resolve(({} if seed is None else {"seed": seed}) | given)
            return Candidate(Settings.model_validate(common), None, adapt, tried, seeded="seed" not in given)
        fields = {"method": entry.method, "options": entry.options, "scale": entry.scale}
        steps = Settings.model_validate(fields).chain()
        free = [
            name in methods() and "seed" in methods()[name].options.keys() - options
            for name, options in steps
        ]
        if seed is not None:
            steps = [
                (name, options | ({"seed": seed} if random else {}))
                for (name, options), random in zip(steps, free, strict=True)
            ]
        method = chain([make_method(name, options) for name, options in steps])
        weights = recipe.weights_by_expert() if method.weighted else 1.0
        chosen = {"method": [{name: options} for name, options in steps], "scale": entry.scale}
        settings = Settings.model_validate({**common, **chosen, "weights": weights})
        seeded = method.seed is not None and any(free)
        return Candidate(settings, method, None, tried, entry.batchnorm == "keep", seeded)
    except UsageError as error:
        raise UsageError(f"{made.label}: {error}") from None
    except ValueError as error:
        raise UsageError(f"{made.label}: {_first(error)}") from None


def _first(error: ValueError) -> str:
    """The first problem of a validation, in words."""
    found = getattr(error, "errors", None)
    return str(found()[0]["msg"]).removeprefix("Value error, ") if callable(found) else str(error)
