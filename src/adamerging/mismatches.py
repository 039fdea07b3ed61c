"""What does not fit between base and experts, gathered into one error a reader can act on."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import PlanError
from .weights.source import Weights

# What can be wrong: kind → (what the group's first line says, remedy). "{n}" becomes "1 tensor", "7 tensors".
_KINDS: dict[str, tuple[str, str]] = {
    "architecture": (
        "looks like another architecture or size of model",
        "another architecture: leave that expert out, or give the base it was fine-tuned from.",
    ),
    "prefix": (
        "matches the base under several prefixes",
        "prefixes: save the expert's body under one prefix.",
    ),
    "shape": (
        "{n} of another shape than in the base",
        "shapes: keep the tensors per task with heads: [...] (it replaces the default heads), or leave them "
        "as in the base with exclude: [...].",
    ),
    "vocabulary": (
        "{n} of another vocabulary size than in the base",
        "vocabulary: merge the rows that all have with vocabulary: shared.",
    ),
    "dtype": (
        "{n} of another kind of number than in the base",
        "dtypes: leave the tensors as in the base with exclude: [...].",
    ),
    "complex": (
        "{n} of complex numbers, which no method merges",
        "complex: leave the tensors as in the base with exclude: [...].",
    ),
    "missing": (
        "lacks {n} that the base and other experts have",
        "missing: give the tensors, keep them per task where they exist with heads: [...] (it replaces the "
        "default heads), or leave them as in the base with exclude: [...].",
    ),
    "blocks": (
        "has fewer blocks than the base: it lacks {n}",
        "blocks: leave that expert out, or leave the tensors as in the base with exclude: [...].",
    ),
    "unexpected": (
        "has {n} that the base lacks, outside every known head",
        "unexpected: keep them per task with heads: [...] (it replaces the default heads), or leave them out "
        "with exclude: [...].",
    ),
    "target": (
        "adapts {n} that the base lacks",
        "LoRA: give the base that the adapter was trained on.",
    ),
    "untied": (
        "{n} tied in the base but not in the expert",
        "untied: give a base that is not tied either, or leave the tensors as in the base with "
        "exclude: [...].",
    ),
}
_SHOWN = 5


class Problems:
    """Everything that is wrong, by expert and kind, so that one wrong expert reads as one problem."""

    def __init__(self, base: Weights, experts: Mapping[str, Weights]) -> None:
        self.base = base
        self.experts = experts
        self.found: dict[tuple[str | None, str], list[tuple[str, str]]] = {}

    def add(self, expert: str | None, kind: str, name: str, detail: str = "") -> None:
        """Note one tensor (or, for whole models, one remark); ``expert`` None means the base."""
        self.found.setdefault((expert, kind), []).append((name, detail))

    def _group(self, expert: str | None, kind: str, items: list[tuple[str, str]]) -> str:
        if expert is None:
            who = f"base ({self.base.label})"
        else:
            weights = self.experts[expert]
            who = f"expert '{expert}' ({weights.label}), base ({self.base.label})"
            theirs, ours = ((w.config or {}).get("model_type") for w in (weights, self.base))
            if theirs is not None and ours is not None and theirs != ours:
                who += f", model_type '{theirs}' and not '{ours}'"
        what = _KINDS[kind][0].format(n="1 tensor" if len(items) == 1 else f"{len(items)} tensors")
        lines = [f"{who}: {what}"]
        lines += [f"      {name}{': ' if name and detail else ''}{detail}" for name, detail in items[:_SHOWN]]
        if len(items) > _SHOWN:
            lines.append(f"      ... and {len(items) - _SHOWN} more")
        return "\n".join(lines)

    def _patterns(self, kind: str) -> str:
        """Patterns that cover the tensors of a kind, where few do."""
        names = [name for (_, k), items in self.found.items() if k == kind for name, _ in items]
        patterns = sorted({f"{name.rpartition('.')[0]}.*" if "." in name else name for name in names})
        return str(patterns) if len(patterns) <= 4 else "[...]"

    def raise_if_any(self) -> None:
        """Raise one PlanError over all that was noted."""
        if not self.found:
            return
        order = list(_KINDS)
        keys = sorted(self.found, key=lambda key: (key[0] is not None, key[0] or "", order.index(key[1])))
        kinds = sorted({kind for _, kind in keys}, key=order.index)
        remedies = [f"  {_KINDS[kind][1].replace('[...]', self._patterns(kind))}" for kind in kinds]
        raise PlanError(
            (self._group(*key, self.found[key]) for key in keys), "\n".join(["What to do:", *remedies])
        )
