"""What a suite takes from the Hugging Face hub: there, or one error that says what to do without a hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import WeightsError
from ..weights.hub import HUB_ID, fetch, split_id
from .files import Filled, Suite


def ensure_weights(suite: Suite, filled: Filled) -> None:
    """Fetch base and experts of a suite, or find them in the hub's cache or where ``--set`` says they are.

    Args:
        suite: one that takes them from the hub.
        filled: with its paths.

    Raises:
        WeightsError: some can neither be fetched nor found; all are listed, with what stood in the way.
    """
    sources = {"base": str(filled.merge["base"]), **{n: str(e) for n, e in filled.merge["experts"].items()}}
    missing: dict[str, str] = {}
    reason = ""
    for name, source in sources.items():
        if Path(source).expanduser().exists():
            continue
        if not HUB_ID.fullmatch(source):
            missing[name] = source
            reason = reason or f"{source} does not exist."
            continue
        try:
            fetch(*split_id(source))
        except WeightsError as error:
            missing[name] = source
            reason = reason or str(error)
    if missing:
        shown = "\n".join(f"  - {name}: {source}" for name, source in missing.items())
        changeable = " ".join(f"--set {name}=..." for name in suite.values)
        raise WeightsError(
            f"the suite {suite.title} takes its base, experts and data sets from the Hugging Face hub; "
            f"{len(missing)} of {len(sources)} models are not at hand:\n{shown}\n{reason}\n"
            f"Run it where the hub can be reached, or give copies: {changeable}"
        )
