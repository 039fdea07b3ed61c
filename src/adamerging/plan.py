"""From the names, shapes and dtypes of base and experts to what happens to each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from .weights.source import Spec

Treatment = Literal["merged", "averaged", "base"]


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
        shared_rows: how many leading rows all have, where a vocabulary grew; else None.
    """

    name: str
    treatment: Treatment
    reason: str
    spec: Spec
    sources: Mapping[str, str]
    shared_rows: int | None = None


@dataclass(frozen=True)
class Plan:
    """The merge plan.

    Attributes:
        entries: by tensor name, in the order of the base's file.
        heads: for each expert (task) the tensors kept for it alone: name in the expert → Spec.
        aliases: tied names of the base, each with the entry it shares.
        notes: what a reader should know about the plan (prefixes removed, patterns used, ...).
    """

    entries: Mapping[str, Entry]
    heads: Mapping[str, Mapping[str, Spec]]
    aliases: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def with_treatment(self, *treatments: Treatment) -> list[Entry]:
        """The entries treated so, in order."""
        return [entry for entry in self.entries.values() if entry.treatment in treatments]
