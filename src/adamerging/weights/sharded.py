"""The index of a model in several files (``*.index.json``), the same for safetensors and torch shards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import WeightsError


def read_index(index: Path) -> dict[str, str]:
    """The ``weight_map`` of an index file.

    Args:
        index: a file ``*.index.json``.

    Returns:
        Shard file name by tensor name, in the order of the index.

    Raises:
        WeightsError: the file is no such index, or names a shard outside its own folder.
    """
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = {str(name): str(shard) for name, shard in weight_map.items()}
    except OSError as error:
        raise WeightsError(f"{index} cannot be read: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(
            f"{index} is not an index of weight shards (a JSON object with 'weight_map'). Fetch it again."
        ) from error
    if not entries:
        raise WeightsError(f"{index} lists no tensor. Fetch it again.")
    outside = sorted(
        {shard for shard in entries.values() if Path(shard).name != shard or shard in ("", "..")}
    )
    if outside:
        raise WeightsError(
            f"{index} names shards outside its folder: {', '.join(outside)}. Do not trust this index."
        )
    return entries


def report_problems(index: Path, problems: Sequence[str]) -> None:
    """Raise one error for everything that is wrong with the shards.

    Args:
        index: the index file.
        problems: one line each.

    Raises:
        WeightsError: there is any problem.
    """
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems[:50])
        more = f"\n  … and {len(problems) - 50} more" if len(problems) > 50 else ""
        raise WeightsError(
            f"{index} and its shards do not fit together ({len(problems)}):\n{listed}{more}\n"
            "Fetch the missing or damaged shards again, all of one revision."
        )
