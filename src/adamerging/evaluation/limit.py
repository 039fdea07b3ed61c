"""The first so many samples of a task's data, which know whose they are."""

from __future__ import annotations

from ..tasks.task import Samples


def first(samples: Samples, count: int | None) -> Samples:
    """The first so many samples; all when None or when there are no more."""
    if count is None or count >= len(samples):
        return samples
    labels = None if samples.labels is None else samples.labels[:count]
    known = f"{_beginning(samples)}{count}"
    return Samples(samples.inputs[:count], labels, samples.source, known)


def cut_from(samples: Samples, whole: Samples) -> bool:
    """Whether some samples are the `first` of others, and not all of them."""
    return samples.fingerprint.startswith(_beginning(whole))


def _beginning(samples: Samples) -> str:
    return f"{samples.fingerprint} first "
