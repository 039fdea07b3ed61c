"""From the names, shapes and dtypes of base and experts to what happens to each tensor.

No tensor is read here. What only values can show (tied copies that differ, tensors that no expert changed)
is left to whoever streams the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from . import naming
from .alignment import (
    Base,
    Expert,
    Selection,
    compare_architecture,
    fits,
    number_kind,
    settle_heads,
    settle_ties,
    settle_unmatched,
    view_expert,
)
from .errors import UsageError
from .mismatches import Problems
from .weights.source import Spec, Weights

Treatment = Literal["merged", "averaged", "base"]
Buffers = Literal["average", "base", "method", "task"]
Vocabulary = Literal["refuse", "shared"]


@dataclass(frozen=True, slots=True)
class Entry:
    """What happens to one tensor of the output body.

    Attributes:
        name: its name in the base, and so in the output.
        treatment: ``merged`` (the method decides), ``averaged`` (BatchNorm statistics: plain mean of
            the experts whatever the method) or ``base`` (copied from the base).
        reason: why, in words for a reader.
        spec: shape and dtype in the base.
        sources: the tensor's name in each expert that has it. An expert that is not here did not
            change the tensor (a LoRA adapter that does not touch it): its task vector is zero.
            Empty where the treatment is ``base``.
        unmerged: where the treatment is ``base``, the tensor's name in each expert that has one of the
            same kind and shape: no merge reads it, but the expert itself computes with it.
        shared_rows: how many leading rows all have, where a vocabulary grew; else None. These rows are
            merged; the output's other rows are the base's.
    """

    name: str
    treatment: Treatment
    reason: str
    spec: Spec
    sources: Mapping[str, str]
    shared_rows: int | None = None
    unmerged: Mapping[str, str] = field(default_factory=dict)

    def name_in(self, expert: str) -> str | None:
        """The tensor's name in an expert, merged or not; None where the expert has none of its own."""
        return self.sources.get(expert) or self.unmerged.get(expert)


@dataclass(frozen=True)
class Plan:
    """The merge plan.

    Attributes:
        entries: by tensor name, in the order of the base's file.
        heads: for each expert (task) the tensors kept for it alone: name in the expert → Spec. A name in
            the expert's ``low_rank`` is a change of the base's tensor (`prefixes` gives its name there).
        aliases: tied names of the base, each with the entry it shares.
        notes: what a reader should know about the plan (prefixes removed, patterns used, ...).
        prefixes: for each expert, what stands before the body's names in the base and in the expert.
        tied_checks: for each expert, pairs of its names that configuration or base say are tied though the
            file stores both. Only the first is read for the merge; whoever streams the plan verifies that
            both hold equal bytes, and refuses otherwise.
        base_tied_checks: the same for the base: ``(entry, stored alias)``.
        extra_rows: for each expert whose vocabulary has more rows than all share, by its own tensor name:
            ``(start, stop)`` of the rows that the output does not hold.
        ignored: for each expert, tensors that neither body nor head needs, with the reason.
    """

    entries: Mapping[str, Entry]
    heads: Mapping[str, Mapping[str, Spec]]
    aliases: Mapping[str, str]
    notes: tuple[str, ...] = ()
    prefixes: Mapping[str, naming.Prefixes] = field(default_factory=dict)
    tied_checks: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    base_tied_checks: tuple[tuple[str, str], ...] = ()
    extra_rows: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    ignored: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def with_treatment(self, *treatments: Treatment) -> list[Entry]:
        """The entries treated so, in order."""
        return [entry for entry in self.entries.values() if entry.treatment in treatments]

    def summary(self) -> dict[str, Any]:
        """Counts as plain data: tensors and parameters by treatment, by reason, and of each expert's head."""
        treatments: dict[str, dict[str, int]] = {
            name: {"tensors": 0, "parameters": 0} for name in ("merged", "averaged", "base")
        }
        reasons: dict[str, dict[str, int]] = {}
        for entry in self.entries.values():
            key = f"{entry.treatment}: {entry.reason}"
            for count in (
                treatments[entry.treatment],
                reasons.setdefault(key, {"tensors": 0, "parameters": 0}),
            ):
                count["tensors"] += 1
                count["parameters"] += entry.spec.numel
        heads = {
            expert: {"tensors": len(specs), "parameters": sum(spec.numel for spec in specs.values())}
            for expert, specs in self.heads.items()
        }
        return {"treatments": treatments, "reasons": reasons, "heads": heads, "aliases": len(self.aliases)}

    def rows(self) -> list[dict[str, Any]]:
        """One plain record an entry, then one a head tensor, for tables and JSON."""
        records: list[dict[str, Any]] = [
            {
                "name": entry.name,
                "treatment": entry.treatment,
                "reason": entry.reason,
                "shape": list(entry.spec.shape),
                "dtype": str(entry.spec.dtype).removeprefix("torch."),
                "parameters": entry.spec.numel,
                "experts": list(entry.sources),
            }
            for entry in self.entries.values()
        ]
        for expert, specs in self.heads.items():
            for name, spec in specs.items():
                records.append(
                    {
                        "name": name,
                        "treatment": "head",
                        "reason": f"kept for {expert}",
                        "shape": list(spec.shape),
                        "dtype": str(spec.dtype).removeprefix("torch."),
                        "parameters": spec.numel,
                        "experts": [expert],
                    }
                )
        return records


def make_plan(
    base: Weights,
    experts: Mapping[str, Weights],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    heads: Sequence[str] | None = None,
    buffers: Buffers = "average",
    vocabulary: Vocabulary = "refuse",
) -> Plan:
    """Decide for every tensor of the base whether it is merged, averaged or copied, and keep heads per task.

    Names, shapes, dtypes and ``config.json`` decide; no tensor is read. Names align after removing the prefix
    that one side puts before its body. A head is what `heads` names; else what lies outside the base prefix
    of a task's model class; else what begins with a usual name (`naming.DEFAULT_HEADS`). The answer does
    not depend on the order of the experts.

    Args:
        base: the pre-trained weights.
        experts: weights fine-tuned from it, by task name.
        include: patterns (`fnmatch`) of base names to merge; empty means all.
        exclude: patterns of base names to copy from the base; they win over `include`.
        heads: patterns of names, with or without prefix, kept per task. Given, they replace the default
            heads; an empty list means no heads.
        buffers: BatchNorm's running mean and variance are averaged, copied from the base, or left to the
            method like any weight; ``task``: averaged, and each task keeps its own beside. Integer buffers
            are always the base's.
        vocabulary: what to do where embeddings have another number of rows: refuse, or merge the leading rows
            that base and experts share. The output has the base's rows.

    Returns:
        The plan. Its entries and aliases together hold each name of the base once.

    Raises:
        UsageError: no experts, an option that does not exist, or a pattern that matches nothing.
        PlanError: base and experts do not fit; lists every mismatch with names, shapes, files and remedies.
    """
    _check_options(experts, buffers, vocabulary)
    problems = Problems(base, experts)
    view = Base(base)
    views = [view_expert(key, experts[key], view, heads, problems) for key in sorted(experts)]
    selection = Selection(include, exclude)
    selection.check(view, views, heads)
    head_entries = settle_heads(view, views)
    for expert in views:
        settle_unmatched(expert, view, selection, problems)
        settle_ties(expert, view, selection, head_entries, problems)
        compare_architecture(expert, view, selection, head_entries, problems)
    plan = _Planner(view, views, selection, head_entries, buffers, vocabulary, problems)
    entries = {name: plan.entry(name) for name in view.entries}
    problems.raise_if_any()
    return Plan(
        entries=entries,
        heads={key: _by_key(views, key).heads for key in experts},
        aliases=view.aliases,
        notes=tuple(_notes(view, views, entries, plan.extra_rows)),
        prefixes={key: _by_key(views, key).prefixes for key in experts},
        tied_checks={v.key: tuple(v.checks) for v in views if v.checks},
        base_tied_checks=tuple(view.checks),
        extra_rows=plan.extra_rows,
        ignored={v.key: v.ignored for v in views if v.ignored},
    )


def _by_key(views: Iterable[Expert], key: str) -> Expert:
    return next(view for view in views if view.key == key)


# --- before anything is compared


def _check_options(experts: Mapping[str, Weights], buffers: str, vocabulary: str) -> None:
    if not experts:
        raise UsageError("no experts: give at least one expert to merge, as name=path")
    for option, value, allowed in (
        ("buffers", buffers, ("average", "base", "method", "task")),
        ("vocabulary", vocabulary, ("refuse", "shared")),
    ):
        if value not in allowed:
            raise UsageError(f"{option} must be one of {', '.join(allowed)}, got {value!r}")


class _Planner:
    """Turns one name of the base after the other into an entry, noting what does not fit."""

    def __init__(
        self,
        base: Base,
        experts: Sequence[Expert],
        selection: Selection,
        heads: set[str],
        buffers: Buffers,
        vocabulary: Vocabulary,
        problems: Problems,
    ) -> None:
        self.base = base
        self.experts = experts
        self.selection = selection
        self.heads = heads
        self.buffers = buffers
        self.vocabulary = vocabulary
        self.problems = problems
        self.extra_rows: dict[str, dict[str, tuple[int, int]]] = {}
        self.blocks = {
            (template, base.entries[entry].shape)
            for expert in experts
            for entry in expert.hits
            if (template := naming.block_template(entry)) is not None
        }

    def entry(self, name: str) -> Entry:
        """The entry of one base tensor."""
        spec = self.base.entries[name]
        kept = self._kept(name, spec)
        if kept is not None:
            return Entry(name, "base", kept, spec, {}, unmerged=self._unmerged(name, spec))
        if spec.dtype.is_complex:
            self.problems.add(None, "complex", name, str(spec))
            return Entry(name, "base", "complex", spec, {})
        missing = self._missing(name)
        if missing is not None:
            self._compare_all(name, spec)
            return Entry(name, "base", missing, spec, {}, unmerged=self._unmerged(name, spec))
        sources = {e.key: e.hits[name][0] for e in self.experts if name in e.hits}
        rows = self._shared_rows(name, spec, sources)
        if naming.is_statistics(name) and self.buffers != "method":
            own = "; each task has its own" if self.buffers == "task" else ""
            return Entry(name, "averaged", f"BatchNorm statistics: mean of the experts{own}", spec, sources)
        reason = (
            "in every expert"
            if len(sources) == len(self.experts)
            else (f"in {len(sources)} of {len(self.experts)} experts; adapters leave it to the others")
        )
        if rows is not None:
            reason += f"; the first {rows} rows, which all share"
        return Entry(name, "merged", reason, spec, sources, rows)

    def _kept(self, name: str, spec: Spec) -> str | None:
        """Why a tensor stays the base's whatever the experts hold, or None."""
        if name in self.heads:
            return "head of the base"
        unselected = self.selection.reason(self.base.names[name])
        if unselected is not None:
            return unselected
        if number_kind(spec) == "integer":
            self._compare_all(name, spec)
            return "boolean" if str(spec.dtype) == "torch.bool" else "integer"
        if spec.numel == 0:
            self._compare_all(name, spec)
            return "empty"
        if naming.is_statistics(name) and self.buffers == "base":
            return "BatchNorm statistics, the base's as asked"
        return None

    def _unmerged(self, name: str, spec: Spec) -> dict[str, str]:
        """The experts' names of a tensor that stays the base's, where theirs could take its place."""
        found = {}
        for expert in self.experts:
            for stored in expert.hits.get(name, [])[:1]:
                theirs = expert.weights.specs[stored]
                same_kind = number_kind(theirs) == number_kind(spec)
                if same_kind and fits(theirs, spec, stored in expert.weights.low_rank):
                    found[expert.key] = stored
        return found

    def _missing(self, name: str) -> str | None:
        """Why a float tensor that experts lack is copied, or None where it is merged (or refused)."""
        counted = [e for e in self.experts if not e.alien]
        lacking = [e for e in counted if e.dense and name not in e.hits]
        if not any(name in e.hits for e in counted):
            template = naming.block_template(name)
            if (template, self.base.entries[name].shape) in self.blocks:
                for expert in lacking:
                    self.problems.add(expert.key, "blocks", name, str(self.base.entries[name]))
            return "only in the base" if lacking else "no expert changes it"
        if lacking and naming.is_recomputed(name):
            return "a buffer that the model computes itself"
        for expert in lacking:
            self.problems.add(expert.key, "missing", name, str(self.base.entries[name]))
        return None

    def _compare_all(self, name: str, spec: Spec) -> None:
        for expert in self.experts:
            for stored in expert.hits.get(name, [])[:1]:
                self._compare(expert, name, stored, spec)

    def _compare(self, expert: Expert, name: str, stored: str, spec: Spec) -> None:
        """Note where an expert's tensor is not of the base's shape or kind of number."""
        theirs = expert.weights.specs[stored]
        detail = f"{theirs}, base {spec}" + (f" ({stored} in the expert)" if stored != name else "")
        if number_kind(theirs) != number_kind(spec):
            kind = "complex" if theirs.dtype.is_complex else "dtype"
            self.problems.add(expert.key, kind, name, detail)
        elif not fits(theirs, spec, stored in expert.weights.low_rank):
            kind = "vocabulary" if self._is_vocabulary(expert, name, stored) else "shape"
            self.problems.add(expert.key, kind, name, detail)

    def _is_vocabulary(self, expert: Expert, name: str, stored: str) -> bool:
        """Whether two tensors differ in the number of rows of one vocabulary, and in nothing else."""
        ours, theirs = self.base.entries[name].shape, expert.weights.specs[stored].shape
        if stored in expert.weights.low_rank or len(ours) not in (1, 2) or ours[1:] != theirs[1:]:
            return False
        if len(theirs) != len(ours):
            return False
        if any(naming.is_vocabulary(each) for each in self.base.names[name]):
            return True
        sizes = [(w.config or {}).get("vocab_size") for w in (self.base.weights, expert.weights)]
        return sizes == [ours[0], theirs[0]]

    def _shared_rows(self, name: str, spec: Spec, sources: Mapping[str, str]) -> int | None:
        """Compare the sources with the base; the rows that all share, where a grown vocabulary is welcome."""
        rows = set()
        for expert in self.experts:
            stored = sources.get(expert.key)
            if stored is None:
                continue
            theirs = expert.weights.specs[stored]
            grown = self.vocabulary == "shared" and self._is_vocabulary(expert, name, stored)
            if grown and theirs.dtype.is_floating_point:
                rows.add(theirs.shape[0])
            else:
                self._compare(expert, name, stored, spec)
        if not rows or rows == {spec.shape[0]}:
            return None
        shared = min(spec.shape[0], *rows)
        for key, stored in sources.items():
            theirs = _by_key(self.experts, key).weights.specs[stored]
            if theirs.shape[0] > shared:
                self.extra_rows.setdefault(key, {})[stored] = (shared, theirs.shape[0])
        return shared


# --- what a reader should know


def _notes(
    base: Base,
    experts: Sequence[Expert],
    entries: Mapping[str, Entry],
    extra_rows: Mapping[str, Mapping[str, tuple[int, int]]],
) -> Iterable[str]:
    yield from _naming_notes(experts)
    absent = [entry.name for entry in entries.values() if entry.reason == "only in the base"]
    if absent:
        yield f"only in the base, and copied: {_list(absent)}"
    for target, alias in base.checks:
        yield f"base: {alias} is tied to {target} by its configuration; equality is checked while streaming"
    for expert in experts:
        yield from _expert_notes(expert, base, entries)
        if expert.key in extra_rows:
            grown = [f"{name} [{a}:{b}]" for name, (a, b) in extra_rows[expert.key].items()]
            yield f"expert '{expert.key}': rows that the merged model does not hold: {_list(grown)}"
    yield from _same_files(experts)


def _naming_notes(experts: Sequence[Expert]) -> Iterable[str]:
    by_prefix: dict[str, list[str]] = {}
    by_rule: dict[str, list[str]] = {}
    for expert in experts:
        if expert.prefixes.expert:
            rule = f"the prefix '{expert.prefixes.expert}' is removed from their names"
            by_prefix.setdefault(rule, []).append(expert.key)
        elif expert.prefixes.base:
            rule = f"their names lack the base's prefix '{expert.prefixes.base}'"
            by_prefix.setdefault(rule, []).append(expert.key)
        if expert.heads:
            by_rule.setdefault(expert.head_rule, []).append(expert.key)
    for rule, keys in by_prefix.items():
        yield f"experts {_list(keys)}: {rule}"
    for rule, keys in by_rule.items():
        yield f"heads of {_list(keys)}: {rule}"


def _same_files(experts: Sequence[Expert]) -> Iterable[str]:
    files: dict[tuple[Any, ...], list[str]] = {}
    for expert in experts:
        if expert.weights.files:
            files.setdefault(expert.weights.files, []).append(expert.key)
    for keys in files.values():
        if len(keys) > 1:
            yield f"experts {_list(keys)} are the same files"


def _expert_notes(expert: Expert, base: Base, entries: Mapping[str, Entry]) -> Iterable[str]:
    who = f"expert '{expert.key}'"
    for first, second in expert.checks:
        yield f"{who}: {second} is a tied copy of {first}; equality is checked while streaming"
    ties = [t[0] for entry, t in expert.hits.items() if t[0] in expert.weights.low_rank and entry in entries]
    tied = [
        name for name in ties if any(len(base.names[e]) > 1 for e, t in expert.hits.items() if t[0] == name)
    ]
    if tied:
        yield f"{who}: adapts {_list(tied)}, tied in the base; the merged model changes both names"
    low_rank_heads = [name for name in expert.heads if name in expert.weights.low_rank]
    if low_rank_heads:
        yield f"{who}: its head {_list(low_rank_heads)} is a low-rank change of the base's"
    if expert.ignored:
        yield f"{who}: ignored {_list(list(expert.ignored))}"
    dtypes = sorted(
        {
            f"{str(expert.weights.specs[source].dtype).removeprefix('torch.')} "
            f"(base {str(entry.spec.dtype).removeprefix('torch.')})"
            for entry in entries.values()
            if (source := entry.sources.get(expert.key)) is not None
            and source not in expert.weights.low_rank
            and expert.weights.specs[source].dtype != entry.spec.dtype
        }
    )
    if dtypes:
        yield f"{who}: stored as {', '.join(dtypes)}"
    theirs, ours = ((w.config or {}).get("model_type") for w in (expert.weights, base.weights))
    if theirs is not None and ours is not None and theirs != ours:
        yield f"{who}: model_type is '{theirs}', the base's '{ours}'"


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
