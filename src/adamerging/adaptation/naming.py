"""What a run of adaptation is called in records, cards and messages."""

from __future__ import annotations

from ..routing.settings import TITLES
from .layerwise_settings import asked_for
from .settings import AdaptSettings


def method_name(settings: AdaptSettings) -> str:
    """As the papers call it; with other objectives than theirs, in words."""
    ended = [] if settings.surgery is None else ["representation surgery"]
    if settings.route is not None:
        begun = [TITLES[settings.route]]
    elif settings.steps == 0 and asked_for(settings.start) is not None:
        begun = ["ProDistill"] if settings.mask is None else ["ProDistill", "learned mask"]
    elif settings.steps == 0 and settings.mask is None and ended:
        begun = []
    else:
        begun = [_learned(settings)]
    return " + ".join([*begun, *ended])


def _learned(settings: AdaptSettings) -> str:
    """The name of coefficients and what is learned along with them."""
    gates, heads = settings.granularity == "singular", settings.heads == "learned"
    plain = not gates and settings.mask is None
    if heads and plain and settings.objective == "self_labels":
        return "SyMerge"
    if settings.objective == "entropy":
        name = "AdaRank" if gates else "AdaMerging" if plain else "Concrete AdaMerging"
        return f"{name} and heads" if heads else name
    what = "values" if settings.granularity == "value" else "coefficients"
    parts = [*(["mask"] if settings.mask is not None else []), *(["gates"] if gates else []), what]
    parts += ["heads"] if heads else []
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"learned {listed} ({settings.objective})"
