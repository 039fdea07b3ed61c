"""What a run says about itself, without labels: collapse, entropy that misleads, coefficients out of use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .coefficients import COMBINED, Layout

COLLAPSED = 0.95
_DRIFT = 0.05


def warnings_of(history: Sequence[Mapping[str, Any]], chosen: int | None = None) -> list[str]:
    """Sentences for the reader, from the first check and that of the state that is returned.

    A task has collapsed when one class takes nearly all predictions, and neither did at the start nor does
    for the expert. Entropy misleads when it falls while the agreement with the expert falls too.

    Args:
        history: of the run.
        chosen: the step whose state is returned; the last one by default.
    """
    checks = [record for record in history if "check" in record]
    end = next((check for check in checks if check["step"] == chosen), checks[-1] if checks else None)
    if end is None or end is checks[0]:
        return []
    found = []
    for task, last in end["check"].items():
        first = checks[0]["check"][task]
        if "largest_class" not in last:  # no classes
            continue
        before = max(first["largest_class"], last.get("largest_class_of_expert", 0.0))
        if last["largest_class"] > COLLAPSED > before:
            found.append(
                f"{task}: predictions collapsed, one class takes {last['largest_class']:.0%} of them "
                f"(at the start {first['largest_class']:.0%})"
            )
        if "agreement" not in first:
            continue
        lost = first["agreement"] - last["agreement"]
        if lost > _DRIFT and last["entropy"] < first["entropy"]:
            found.append(
                f"{task}: entropy fell from {first['entropy']:.3f} to {last['entropy']:.3f} while agreement "
                f"with the expert fell from {first['agreement']:.1%} to {last['agreement']:.1%}; confident "
                "is not right here: use objective: agreement"
            )
    return found


def unused(values: Tensor, where: Layout) -> list[str]:
    """Sentences about experts whose coefficients are all 0, as applied; none if all are in a combined row."""
    idle = [row for row, own in zip(where.rows, values, strict=True) if not bool(own.any())]
    if not idle or (COMBINED in where.rows and COMBINED not in idle):
        return []
    if len(idle) == len(where.rows):
        return ["all coefficients are 0: the merged model is the base"]
    return [f"all coefficients of {', '.join(idle)} are 0: nothing of it is in the merged model"]
