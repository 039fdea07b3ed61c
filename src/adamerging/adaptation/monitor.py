"""What the history of a run says about itself, without labels: collapse, and entropy that misleads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLLAPSED = 0.95
_DRIFT = 0.05


def warnings_of(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences for the reader, from the first and the last check.

    A task has collapsed when one class takes nearly all predictions, and neither did at the start nor does
    for the expert. Entropy misleads when it falls while the agreement with the expert falls too.
    """
    checks = [record["check"] for record in history if "check" in record]
    if len(checks) < 2:
        return []
    found = []
    for task, last in checks[-1].items():
        first = checks[0][task]
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
                f"with the expert fell from {first['agreement']:.1%} to {last['agreement']:.1%}; confident is "
                "not right here: use objective: agreement"
            )
    return found
