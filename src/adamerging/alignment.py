"""Base and experts under one set of names: which tensor is which, which are heads, which are tied copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from math import prod
from typing import Any

from . import naming
from .errors import UsageError
from .mismatches import Problems
from .weights.source import Spec, Weights


def shapes_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    """Shape by name, tied names included."""
    shapes = {name: spec.shape for name, spec in weights.specs.items()}
    return shapes | {alias: weights.specs[target].shape for alias, target in weights.aliases.items()}


def number_kind(spec: Spec) -> str:
    """``float``, ``integer`` (booleans too) or ``complex``."""
    if spec.dtype.is_complex:
        return "complex"
    return "float" if spec.dtype.is_floating_point else "integer"


def tied_by_config(config: Mapping[str, Any] | None) -> bool | None:
    """Whether the configuration ties embeddings, by its own word or by its model type's default."""
    said = naming.ties_embeddings(config)
    if said is None and config and isinstance(config.get("model_type"), str):
        return naming.ties_by_default(config["model_type"])
    return said


def fits(spec: Spec, base: Spec, low_rank: bool) -> bool:
    """Whether an expert's tensor has the base's shape; a low-rank one may come as ``(rows, cols)``."""
    if spec.shape == base.shape:
        return True
    return low_rank and len(base.shape) > 1 and spec.shape == (base.shape[0], prod(base.shape[1:]))


class Base:
    """The base with tied names folded into one entry each."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.shapes = shapes_of(weights)
        self.checks: list[tuple[str, str]] = []
        folded = self._stored_ties()
        self.aliases = {name: folded.get(target, target) for name, target in weights.aliases.items()} | folded
        self.entries = {name: spec for name, spec in weights.specs.items() if name not in folded}
        self.names: dict[str, list[str]] = {name: [name] for name in self.entries}
        for alias, target in self.aliases.items():
            self.names[target].append(alias)
        self.checks = [(target, alias) for alias, target in folded.items()]
        self.architecture = naming.architecture(weights.config)

    def _stored_ties(self) -> dict[str, str]:
        """Tied names that the file stores in full all the same, each with the tensor it is tied to."""
        weights = self.weights
        pairs = {}
        for name in weights.specs:
            partner = naming.tie_partner(name, self.shapes)
            if partner is not None:
                pairs[name] = weights.aliases.get(partner, partner)
        if not pairs or not tied_by_config(weights.config):
            return {}
        return {name: target for name, target in pairs.items() if name != target and target not in pairs}

    def known(self, name: str) -> bool:
        """Whether the base has a tensor of this name, tied or not."""
        return name in self.entries or name in self.aliases

    def entry(self, name: str) -> str:
        """The entry of a known name."""
        return self.aliases.get(name, name)


@dataclass
class Expert:
    """One expert, seen through the base's names."""

    key: str
    weights: Weights
    prefixes: naming.Prefixes
    is_head: Callable[[str], bool]
    head_rule: str
    hits: dict[str, list[str]] = field(default_factory=dict)  # entry → its tensors, best first
    unmatched: list[str] = field(default_factory=list)
    heads: dict[str, Spec] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    checks: list[tuple[str, str]] = field(default_factory=list)
    alien: bool = False

    @property
    def dense(self) -> bool:
        """A whole model, not an adapter."""
        return not self.weights.low_rank

    def names(self, stored: str) -> list[str]:
        """All names of one stored tensor."""
        return [stored, *(alias for alias, target in self.weights.aliases.items() if target == stored)]

    def forms(self, name: str) -> list[str]:
        """What a user may write for a name: as stored, without the prefix, as the base has it."""
        local = self.prefixes.local(name)
        return [name] if local is None else [name, local, self.prefixes.base + local]


class Selection:
    """The user's include and exclude patterns."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self.include = tuple(include)
        self.exclude = tuple(exclude)

    def reason(self, names: Sequence[str]) -> str | None:
        """Why a tensor of these names is left as in the base, or None where it is to be merged."""
        pattern = naming.matching(self.exclude, names)
        if pattern is not None:
            return f"excluded by '{pattern}'"
        if self.include and naming.matching(self.include, names) is None:
            return "not matched by include"
        return None

    def check(self, base: Base, experts: Sequence[Expert], heads: Sequence[str] | None) -> None:
        """Refuse patterns that match nothing: a typing error would otherwise pass unseen."""
        own = [*base.entries, *base.aliases]
        alone = [form for e in experts for name in e.unmatched for form in e.forms(name)]
        theirs = [form for e in experts for name in shapes_of(e.weights) for form in e.forms(name)]
        for option, patterns, names in (
            ("include", self.include, own),
            ("exclude", self.exclude, own + alone),
            ("heads", heads or (), own + theirs),
        ):
            for pattern in patterns:
                if naming.matching([pattern], names) is None:
                    near = get_close_matches(pattern, set(names), n=1, cutoff=0.4)
                    hint = f"; the nearest name is '{near[0]}'" if near else ""
                    raise UsageError(f"{option}: the pattern '{pattern}' matches no tensor{hint}")


def view_expert(
    key: str, weights: Weights, base: Base, heads: Sequence[str] | None, problems: Problems
) -> Expert:
    """Align one expert's names with the base's and find the rule for its head."""
    shapes = shapes_of(weights)
    name = naming.architecture(weights.config) or base.architecture
    kind = naming.kind(name)
    pairs = naming.align(
        base.shapes, shapes, lambda: naming.class_prefix(name) if name and kind == "task" else None
    )
    if len(pairs) > 1:
        problems.add(key, "prefix", ", ".join(repr(p.expert or p.base) for p in pairs))
    prefixes = pairs[0]
    expert = Expert(key, weights, prefixes, lambda _: False, "")
    expert.alien = len(pairs) > 1
    expert.is_head, expert.head_rule = _head_rule(expert, base, heads, name, kind, list(shapes))
    if heads is None and any(map(naming.is_pooler, shapes)) and not any(map(naming.is_pooler, base.shapes)):
        rest = expert.is_head
        expert.is_head = lambda n: rest(n) or naming.is_pooler(n)
        expert.head_rule += ", and the pooler, which the base lacks"
    for stored in weights.specs:
        found = False
        for each in expert.names(stored):
            target = prefixes.to_base(each, base.known)
            if target is None:
                continue
            found = True
            tensors = expert.hits.setdefault(base.entry(target), [])
            if stored not in tensors:
                # The tensor under the base's own kept name comes first; it is the one that is read.
                tensors.insert(0 if target in base.entries else len(tensors), stored)
        if not found:
            expert.unmatched.append(stored)
    return expert


def _head_rule(
    expert: Expert,
    base: Base,
    heads: Sequence[str] | None,
    name: str | None,
    kind: naming.Kind,
    names: list[str],
) -> tuple[Callable[[str], bool], str]:
    """The predicate on the expert's names that says what is its head, and the rule in words."""
    prefixes = expert.prefixes
    outside = bool(prefixes.expert) and any(prefixes.local(each) is None for each in names)
    known = {each for each in names if prefixes.to_base(each, base.known) is not None}
    if heads is not None:
        return (lambda n: naming.matching(heads, expert.forms(n)) is not None), f"heads {list(heads)}"

    body: str | None = None
    if kind == "task" and name is not None and not (outside and naming.kind(base.architecture) != "task"):
        prefix = naming.class_prefix(name)
        body = naming.body_of(names, prefixes, prefix) if prefix else None
        if body is not None:
            rest = body
            return (lambda n: not n.startswith(rest)), f"outside '{body}', the base prefix of {name}"
    if outside and kind != "language":
        # A language model's head that the base has too is part of what is merged.
        def beyond(n: str) -> bool:
            return prefixes.local(n) is None and not (n in known and naming.is_vocabulary(n))

        return beyond, f"outside the prefix '{prefixes.expert}'"

    wrapper = naming.wrapper_of([prefixes.local(each) or each for each in names])

    def usual(n: str) -> bool:
        local = prefixes.local(n)
        if kind == "language" and n in known:
            return False
        return local is None or naming.is_default_head(local.removeprefix(wrapper))

    return usual, "usual names of heads"


def settle_heads(base: Base, experts: Sequence[Expert]) -> set[str]:
    """Give each expert its heads; return the entries of the base that are heads to any of them."""
    entries: set[str] = set()
    for expert in experts:
        for entry, tensors in expert.hits.items():
            if any(all(map(expert.is_head, expert.names(stored))) for stored in tensors):
                entries.add(entry)
    for expert in experts:
        # What is a head to one expert is a head to all that have it.
        for entry in entries & expert.hits.keys():
            expert.heads.update((stored, expert.weights.specs[stored]) for stored in expert.hits.pop(entry))
        expert.heads = {name: spec for name, spec in expert.weights.specs.items() if name in expert.heads}
    return entries


def settle_unmatched(expert: Expert, base: Base, selection: Selection, problems: Problems) -> None:
    """What only the expert has: a tied copy, a head, a buffer it computes itself, or a mismatch."""
    shapes = shapes_of(expert.weights)
    for stored in expert.unmatched:
        spec = expert.weights.specs[stored]
        names = [form for each in expert.names(stored) for form in expert.forms(each)]
        partner = naming.tie_partner(stored, shapes)
        if partner is not None:
            partner = expert.weights.aliases.get(partner, partner)
        tied = partner is not None and any(partner in tensors for tensors in expert.hits.values())
        if tied and partner is not None and _says_tied(expert, base):
            expert.checks.append((partner, stored))
        elif all(map(expert.is_head, expert.names(stored))) and stored not in expert.weights.low_rank:
            expert.heads[stored] = spec
        elif selection.reason(names) is not None:
            expert.ignored[stored] = selection.reason(names) or ""
        elif stored in expert.weights.low_rank:
            problems.add(expert.key, "target", stored, str(spec))
        elif number_kind(spec) == "integer" or naming.is_recomputed(stored):
            expert.ignored[stored] = "a buffer that the base does not store"
        elif tied and tied_by_config(base.weights.config):
            problems.add(expert.key, "untied", stored, f"{spec} beside {partner}")
        else:
            problems.add(expert.key, "unexpected", stored, str(spec))


def _says_tied(expert: Expert, base: Base) -> bool:
    """Whether what looks like an output embedding is tied: by the expert's configuration, else the base's."""
    said = naming.ties_embeddings(expert.weights.config)
    if said is None and expert.weights.config is None:
        return bool(tied_by_config(base.weights.config))
    return bool(tied_by_config(expert.weights.config) if said is None else said)


def settle_ties(
    expert: Expert, base: Base, selection: Selection, heads: set[str], problems: Problems
) -> None:
    """Where the base ties what the expert stores apart: equal copies (checked while streaming) or not."""
    for entry, tensors in expert.hits.items():
        if entry in heads or selection.reason(base.names[entry]) is not None:
            continue
        detail = f"{' and '.join(tensors)}, one tensor in the base ({', '.join(base.names[entry])})"
        full = [stored for stored in tensors if stored not in expert.weights.low_rank]
        if len(tensors) > len(full) and len(tensors) > 1:
            problems.add(expert.key, "untied", entry, detail)
        elif len(tensors) > 1:
            if _copies_may_be_equal(expert.weights):
                expert.checks.extend((tensors[0], other) for other in tensors[1:])
            else:
                problems.add(expert.key, "untied", entry, detail)
        elif not expert.dense and full and len(base.names[entry]) > 1 and len(expert.names(full[0])) == 1:
            # An adapter that saves one of two tied modules in full has trained it apart from the other.
            problems.add(expert.key, "untied", entry, detail)


def _copies_may_be_equal(weights: Weights) -> bool:
    """Two stored copies of what the base ties: not where the configuration unties them, nor where the format
    would have shown them as one (torch files and modules keep shared storage) and nothing says they are tied.
    """
    said = naming.ties_embeddings(weights.config)
    if said is not None:
        return said
    return any(path.suffix == ".safetensors" for path in weights.files)


def compare_architecture(
    expert: Expert, base: Base, selection: Selection, heads: set[str], problems: Problems
) -> None:
    """Say so where an expert has next to nothing in common with what is to be merged of the base."""
    if expert.alien:
        return
    specs, low_rank = expert.weights.specs, expert.weights.low_rank
    body = [name for name in base.entries if name not in heads and selection.reason(base.names[name]) is None]
    pairs = [(name, expert.hits[name][0]) for name in body if name in expert.hits]
    kept = {*expert.heads, *expert.ignored, *(copy for _, copy in expert.checks)}
    own = len(pairs) + sum(name not in kept for name in expert.unmatched)
    fitting = sum(fits(specs[stored], base.entries[name], stored in low_rank) for name, stored in pairs)
    least = min(len(body), own) if expert.dense else own
    if 2 * fitting < least or (body and not own and not low_rank):
        expert.alien = True
        problems.add(expert.key, "architecture", f"{fitting} of its {own} tensors fit the base's {len(body)}")
