"""Embeddings of models whose vocabularies differ: which rows are merged, and where the others come from.

Rows are told by what they mean. Those whose tokens the base has, at the same numbers in every expert, are
merged; what follows belongs to the tokenizer that the output carries: the base's rows, an expert's, or for
each token of a union the mean of its rows in the experts that have it. Rows that pad the base's embedding to
a round number mean nothing, so a token that an expert put there counts as new.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from . import naming
from .errors import PlanError, UsageError
from .plan import Entry, Plan
from .tokens import Tokens, read_tokens, unite
from .weights.source import Spec, Weights

EXTRA = ".extra_rows"
"""Ends the name of a tensor in a task's head that holds the rows the merged model has no place for."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive rows of an output tensor: the mean of as many rows of some models.

    Attributes:
        count: how many.
        sources: for each model (an expert's task, or None for the base) the first of its rows.
    """

    count: int
    sources: tuple[tuple[str | None, int], ...]


@dataclass(frozen=True)
class Vocabulary:
    """What the output's vocabulary is.

    Attributes:
        tails: by entry, what follows its merged rows; an entry that is not here keeps the base's rows.
        files: tokenizer files to write instead of the base's, by name.
        extra_tokens: by expert, the tokens of the rows that are kept for its task alone.
    """

    tails: Mapping[str, tuple[Rows, ...]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    extra_tokens: Mapping[str, Mapping[int, str]] = field(default_factory=dict)

    def spec(self, entry: Entry) -> Spec:
        """Shape of the output's tensor, in the base's dtype."""
        if entry.name not in self.tails:
            return entry.spec
        rows = (entry.shared_rows or 0) + sum(part.count for part in self.tails[entry.name])
        return Spec((rows, *entry.spec.shape[1:]), entry.spec.dtype)

    def resized(self, config: Mapping[str, Any], entries: Mapping[str, Entry]) -> dict[str, Any]:
        """A configuration with the output's ``vocab_size`` where that differs from the base's."""
        changes = {entries[name].spec.shape[0]: self.spec(entries[name]).shape[0] for name in self.tails}
        result = dict(config)
        for level in ("text_config", "decoder"):
            if isinstance(result.get(level), Mapping):
                result[level] = self.resized(result[level], entries)
        if result.get("vocab_size") in changes:
            result["vocab_size"] = changes[result["vocab_size"]]
        return result

    def metadata(self, task: str, plan: Plan) -> dict[str, str]:
        """What says which rows a head's extra tensors hold, for the file they are in."""
        rows = {f"{name}{EXTRA}": f"{a}:{b}" for name, (a, b) in plan.extra_rows.get(task, {}).items()}
        if rows and self.extra_tokens.get(task):
            rows["extra_tokens"] = json.dumps(self.extra_tokens[task], ensure_ascii=False)
        return rows


def settle(
    plan: Plan, base: Weights, experts: Mapping[str, Weights], tokenizer: str
) -> tuple[Plan, Vocabulary]:
    """Decide on the rows of all vocabulary tensors. Reads tokenizers, no weights.

    Args:
        plan: made with ``vocabulary="shared"``.
        tokenizer: ``base``, ``union`` or an expert's task.

    Returns:
        The plan with its vocabulary tensors' shared rows and the experts' extra rows put right, and the rest.

    Raises:
        UsageError: the tokenizer that was asked for is not there, or no union can be made.
        PlanError: tokenizers give one number to different tokens, or a token has no row.
    """
    tokens = {task: found for task, weights in experts.items() if (found := read_tokens(weights.folder))}
    own = read_tokens(base.folder)
    _check_present(tokenizer, base, own, tokens)
    if own is not None:
        _check_agreement(own, base, experts, tokens)
    new = {
        task: {number: token for token, number in found.ids.items() if token not in own.ids}
        for task, found in tokens.items()
        if own is not None
    }
    settled = _Settling(plan, experts, tokenizer, own, tokens, {t: n for t, n in new.items() if n})
    return settled.plan(), settled.vocabulary()


def extra(weights: Weights, rows: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
    """The rows of an expert that the merged model has no place for, under their names in the head."""
    return {f"{name}{EXTRA}": weights.read(name)[start:stop].clone() for name, (start, stop) in rows.items()}


def read_rows(
    base: Weights, experts: Mapping[str, Weights], entry: Entry, rows: Rows, start: int, stop: int
) -> Tensor:
    """Rows ``[start, stop)`` of a part of an output tensor, in the dtype of arithmetic."""
    dtype = torch.float64 if entry.spec.dtype == torch.float64 else torch.float32
    found = []
    for task, first in rows.sources:
        tensor = base.read(entry.name) if task is None else experts[task].read(entry.sources[task])
        found.append(tensor[first + start : first + stop].to(dtype))
    return found[0] if len(found) == 1 else torch.stack(found).mean(0)


def _check_present(tokenizer: str, base: Weights, own: Tokens | None, tokens: Mapping[str, Tokens]) -> None:
    if tokenizer == "union" and own is None:
        raise UsageError(f"tokenizer: union starts from the base's tokenizer, and {base.label} has none")
    if tokenizer not in ("base", "union") and tokenizer not in tokens:
        raise UsageError(
            f"tokenizer: expert '{tokenizer}' has no tokenizer files; "
            f"those with them: {', '.join(tokens) or 'none'}; or tokenizer: base"
        )


def _check_agreement(
    own: Tokens, base: Weights, experts: Mapping[str, Weights], tokens: Mapping[str, Tokens]
) -> None:
    """One number, one token, in the base and every expert."""
    problems = []
    for task, found in tokens.items():
        wrong = [n for n, token in sorted(found.by_id.items()) if own.by_id.get(n, token) != token]
        if wrong:
            shown = "; ".join(f"{n} is {own.by_id[n]!r} and {found.by_id[n]!r}" for n in wrong[:3])
            more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            problems.append(
                f"tokenizers of {base.label} and of expert '{task}' ({experts[task].label}) disagree: "
                f"{shown}{more}"
            )
    if problems:
        raise PlanError(
            problems,
            "Rows of different tokens cannot be merged. Leave these experts out, exclude the embeddings "
            "(exclude: ['*embed*', 'lm_head*']) with tokenizer: base, or renumber one of the vocabularies.",
        )


class _Settling:
    """Goes through the vocabulary tensors one after the other."""

    def __init__(
        self,
        plan: Plan,
        experts: Mapping[str, Weights],
        tokenizer: str,
        own: Tokens | None,
        tokens: Mapping[str, Tokens],
        new: Mapping[str, Mapping[int, str]],
    ) -> None:
        self.old, self.experts, self.tokenizer = plan, experts, tokenizer
        self.own, self.tokens, self.new = own, tokens, new
        self.union = unite(own, tokens) if tokenizer == "union" and own is not None else None
        self.entries: dict[str, Entry] = {}
        self.tails: dict[str, tuple[Rows, ...]] = {}
        self.extra: dict[str, dict[str, tuple[int, int]]] = {}
        self.problems: list[str] = []
        for entry in self._vocabulary_entries():
            self._settle(entry)
        if self.problems:
            raise PlanError(
                self.problems, "Take another tokenizer: base, or an expert that has all its rows."
            )

    def _vocabulary_entries(self) -> Iterator[Entry]:
        """Those whose rows are tokens: by their names, or because their number of rows differs."""
        tied: dict[str, list[str]] = {}
        for alias, name in self.old.aliases.items():
            tied.setdefault(name, []).append(alias)
        for entry in self.old.entries.values():
            named = any(naming.is_vocabulary(name) for name in (entry.name, *tied.get(entry.name, ())))
            if entry.treatment == "merged" and (named or entry.shared_rows is not None):
                yield entry
            elif named and entry.reason != "head of the base":
                self._check_copied(entry)

    def _check_copied(self, entry: Entry) -> None:
        """A vocabulary tensor that stays the base's has rows for the base's tokens alone."""
        rows = entry.spec.shape[0]
        wanted = self.tokens[self.tokenizer].size if self.tokenizer in self.tokens else 0
        wanted = (self.own.size + len(self.union.new)) if self.union and self.own else wanted
        if wanted > rows:
            self.problems.append(
                f"{entry.name} is copied from the base ({entry.reason}) and has {rows} rows, "
                f"and tokenizer: {self.tokenizer} has {wanted} tokens"
            )

    def _settle(self, entry: Entry) -> None:
        ours = entry.spec.shape[0]
        theirs = {task: self._rows(task, entry) for task in entry.sources}
        if self.tokenizer in self.tokens and self.tokens[self.tokenizer].size > theirs.get(
            self.tokenizer, ours
        ):
            self.problems.append(
                f"expert '{self.tokenizer}' has {self.tokens[self.tokenizer].size} tokens, "
                f"and {theirs.get(self.tokenizer, ours)} rows in {entry.name}"
            )
        if not self.new and entry.shared_rows is None:
            return
        known = ours if self.own is None else min(ours, self.own.size)
        shared = min(known, *theirs.values())
        reason = entry.reason.split(";")[0] + f"; the first {shared} rows, which all share"
        self.entries[entry.name] = replace(entry, shared_rows=shared, reason=reason)
        if self.union is not None and self.own is not None:
            self.tails[entry.name] = tuple(self._united(entry, shared, known, theirs))
        elif self.tokenizer != "base":
            owner = self.tokenizer if self.tokenizer in theirs else None
            count = theirs.get(self.tokenizer, ours) - shared
            self.tails[entry.name] = (Rows(count, ((owner, shared),)),) if count else ()
        for task, rows in theirs.items():
            new = task in self.new or task not in self.tokens or self.own is None
            if new and rows > shared and self.tokenizer not in ("union", task):
                self.extra.setdefault(task, {})[entry.sources[task]] = (shared, rows)

    def _rows(self, task: str, entry: Entry) -> int:
        return self.experts[task].specs[entry.sources[task]].shape[0]

    def _united(self, entry: Entry, shared: int, known: int, theirs: Mapping[str, int]) -> Iterable[Rows]:
        """The base's own rows, the new tokens', and what is left of the base's padding."""
        assert self.union is not None
        ours = entry.spec.shape[0]
        if known > shared:
            yield Rows(known - shared, ((None, shared),))
        for token in self.union.new:
            having = [
                (task, self.tokens[task].ids[token])
                for task in theirs
                if task in self.tokens and self.tokens[task].ids.get(token, theirs[task]) < theirs[task]
            ]
            if not having:
                self.problems.append(f"{entry.name}: no expert has a row for the token {token!r}")
            yield Rows(1, tuple(having))
        total = known + len(self.union.new)
        if ours > total:
            yield Rows(ours - total, ((None, total),))

    def plan(self) -> Plan:
        """The plan with what was found."""
        notes = [note for note in self.old.notes if "rows that the merged model does not hold" not in note]
        for task, rows in self.extra.items():
            grown = ", ".join(f"{name} [{a}:{b}]" for name, (a, b) in rows.items())
            notes.append(f"expert '{task}': rows of its own tokens are kept for its task: {grown}")
        silent = [task for task in self.experts if task not in self.tokens]
        if silent and self.own is not None:
            notes.append(f"without tokenizer files, taken to have the base's tokens: {', '.join(silent)}")
        notes += self.union.notes if self.union is not None else ()
        return replace(
            self.old,
            entries={name: self.entries.get(name, entry) for name, entry in self.old.entries.items()},
            extra_rows=self.extra,
            notes=tuple(notes),
        )

    def vocabulary(self) -> Vocabulary:
        """The output's vocabulary."""
        return Vocabulary(
            self.tails,
            self.union.files if self.union is not None else {},
            {task: self.new[task] for task in self.extra if task in self.new},
        )
