"""Which rows a comparison has, and what each of them depends on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adaptation.cache import key
from ..adaptation.settings import AdaptSettings
from ..units import duration
from .bench import Bench
from .beside import Beside
from .cache import VERSION
from .entries import Wanted
from .limit import cut_from
from .pace import Pace
from .records import AVERAGE, BASE, RowKind, label_of_expert
from .settings import CompareSettings
from .splits import Group
from .store import row_name


@dataclass(frozen=True)
class Planned:
    """One row to come.

    Attributes:
        label, kind, seed, group: as in `records.Row`.
        experts: that are merged, or the one whose row it is; none for the base.
        wanted: how to merge; None for base, expert and average.
        tasks: that are scored under their own heads.
        unseen: that are scored as tasks that no expert saw.
        beside: the model made elsewhere; None for what is made here.
    """

    label: str
    kind: RowKind
    experts: tuple[str, ...]
    tasks: tuple[str, ...]
    wanted: Wanted | None = None
    seed: int | None = None
    group: str | None = None
    unseen: tuple[str, ...] = ()
    beside: Beside | None = None

    @property
    def name(self) -> str:
        """Name of its file."""
        return row_name(self.label, self.group, self.seed)

    def key(self, bench: Bench) -> str:
        """Hash of all that it is computed from."""
        entry: Any = None
        if self.wanted is not None:
            entry = [
                self.wanted.entry.choose_on if self.wanted.entry.sweep else None,
                [
                    [
                        candidate.settings.model_dump(exclude={"threads"}),
                        candidate.adapt and _learning(candidate.adapt, bench),
                        *(["statistics kept"] if candidate.keeps_statistics else []),
                        *(["the experts' statistics"] if candidate.masked else []),
                    ]
                    for candidate in self.wanted.candidates(self.seed)
                ],
            ]
        if self.beside is not None:
            entry = self.beside.content(bench)
        transductive = None if self.wanted is None else self.wanted.recipe.transductive
        own: list[Any] = [self.kind, self.seed, self.group, self.experts, self.tasks, entry, transductive]
        if self.kind == "average" and bench.prepared.own_statistics:
            own.append("statistics of each task's own")
        own += _noise_in_common(bench)
        outside = [bench.content_outside[name] for name in self.unseen]
        scoring = scoring_of(bench.settings, whole=self.group is None)
        return key("row", VERSION, own, scoring, str(bench.device), bench.content, outside)


def _learning(adapt: AdaptSettings, bench: Bench) -> dict[str, Any]:
    """What learning depends on: the settings, and of files that they name the content."""
    fields = adapt.model_dump(exclude={"save_every", "budget"})
    named = [(fields, "coefficients"), (fields["mask"] or {}, "logits")]
    for section, name in named:
        if section.get(name) is not None:
            section[name] = bench.hash_of(Path(section[name])) or section[name]
    return fields


def _noise_in_common(bench: Bench) -> list[Any]:
    """Tasks that adapt to the corrupted data whose first samples they are scored on: it is the same data."""
    shift = bench.settings.shift
    if shift is None or shift.apply != "both":
        return []
    tasks = [seat.task for seat in bench.seats.values()]
    cut = [t.name for t in tasks if t.adapt and t.evaluate and cut_from(t.evaluate, t.adapt)]
    return [["noise in common", cut]] if cut else []


MANY = 200
"""Steps from which on it is worth a try to say how long they take."""


@dataclass(frozen=True)
class Outlook:
    """What a comparison has before it, known before its first row.

    Attributes:
        rows: how many it has.
        kept: of these, rows that an earlier run left and that are as good as new.
        learning: rows to be made whose coefficients are learned.
        steps: optimisation steps that these take together, all that a sweep tries included, and those of
            learning anew under every corruption.
        seconds: that the steps take at least, see `pace`; None for few, and where it could not be tried.
    """

    rows: int
    kept: int
    learning: int
    steps: int
    seconds: float | None = None

    def __str__(self) -> str:
        kept = f", {self.kept} of them kept" if self.kept else ""
        learned = f"; {self.learning} to learn, {self.steps} steps in all" if self.learning else ""
        time = f", {duration(self.seconds)} or more" if self.seconds is not None else ""
        return f"{self.rows} rows{kept}{learned}{time}"


def outlook(
    planned: Sequence[Planned], kept: Collection[str], *, anew: int = 0, pace: Pace | None = None
) -> Outlook:
    """What the rows take.

    Args:
        planned: all rows.
        kept: names of those that are there already.
        anew: times that a row of all experts is learned anew, once for every corruption it adapts to.
        pace: how long a step takes; asked where there are many.
    """
    learning: list[tuple[AdaptSettings, int]] = []
    rows = [row for row in planned if row.kind == "learned" and row.name not in kept]
    for row in rows:
        assert row.wanted is not None
        found = [adapt for candidate in row.wanted.candidates(row.seed) if (adapt := candidate.adapt)]
        again = found[:1] * anew if row.group is None else []
        learning += [(adapt, _steps(adapt)) for adapt in [*found, *again]]
    steps = sum(number for _, number in learning)
    seconds = None
    if pace is not None and steps >= MANY:
        parts = [(pace(adapt), number) for adapt, number in learning]
        known = [each * number for each, number in parts if each is not None]
        seconds = sum(known) if len(known) == len(parts) else None
    return Outlook(len(planned), len(kept), len(rows), steps, seconds)


def _steps(adapt: AdaptSettings) -> int:
    return adapt.steps + sum(part.steps for part in (adapt.mask, adapt.surgery) if part is not None)


def scoring_of(settings: CompareSettings, *, whole: bool = True) -> dict[str, Any]:
    """What of the settings says how a row is scored.

    Args:
        settings: of the comparison.
        whole: of a row of all experts; those of a group are scored on clean data and not explained.
    """
    return settings.model_dump(
        include={"limit", "precision", "bootstrap", *(("shift", "why") if whole else ())}
    )


def plan_rows(
    experts: Sequence[str],
    tasks: Sequence[str],
    wanted: Sequence[Wanted],
    seeds: Sequence[int],
    unseen: Sequence[str] = (),
    groups: Sequence[Group] = (),
    models: Sequence[Beside] = (),
) -> list[Planned]:
    """The rows for all experts: base, each expert, models made elsewhere, the average, then what was asked.

    Then the groups'.

    Args:
        experts: names, in order.
        tasks: those that are scored.
        wanted: what was asked for; a plain average among it is the row that is there anyway.
        seeds: a learned or random merge has a row for each.
        unseen: tasks without an expert, which the rows for all experts are scored on too.
        groups: of experts to merge apart, each with a base and an average of its own.
        models: made elsewhere.
    """
    everyone, scored, outside = tuple(experts), tuple(tasks), tuple(unseen)
    rows = [Planned(BASE, "base", (), scored, unseen=outside)]
    rows += [
        Planned(label_of_expert(name), "expert", (name,), scored, unseen=outside)
        for name in scored
        if name in everyone
    ]
    rows += [Planned(model.label, "plain", (), tuple(model.folders), beside=model) for model in models]
    rows.append(Planned(AVERAGE, "average", everyone, scored, unseen=outside))
    rows += merged_rows(everyone, scored, wanted, seeds, unseen=outside)
    for group in groups:
        some, held_out, name = tuple(group["experts"]), tuple(group["held_out"]), group["group"]
        held_in = tuple(task for task in group["held_in"] if task in scored)
        rows.append(Planned(BASE, "base", some, held_in, group=name, unseen=held_out))
        rows.append(Planned(AVERAGE, "average", some, held_in, group=name, unseen=held_out))
        rows += merged_rows(some, held_in, wanted, seeds, name, held_out)
    return rows


def merged_rows(
    experts: tuple[str, ...],
    tasks: tuple[str, ...],
    wanted: Sequence[Wanted],
    seeds: Sequence[int],
    group: str | None = None,
    unseen: tuple[str, ...] = (),
) -> list[Planned]:
    """The rows of what was asked for, of some of the experts."""
    rows = []
    for item in wanted:
        if item.label == AVERAGE and item.plain_average:
            continue
        own: Sequence[int | None] = [item.seed]
        if item.seed is None and any(candidate.seeded for candidate in item.candidates()):
            own = seeds
        kind: RowKind = "learned" if item.learned else "static"
        rows += [
            Planned(item.row_label, kind, experts, tasks, item, seed, group, unseen)
            for seed in dict.fromkeys(own)
        ]
    return rows
