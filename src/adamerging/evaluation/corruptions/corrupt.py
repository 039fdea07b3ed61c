"""Samples → the same samples corrupted, computed as they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random
from typing import Any, overload

import numpy as np

from ...errors import UsageError
from ...tasks.task import Samples
from .pictures import may_be_picture, open_picture
from .severities import SEVERITIES, setting
from .table import Corruption, InputKind, find, names_for
from .text import corrupt_text

_VERSION = 1
"""Of what the corruptions do; part of the fingerprint, so that old results are not taken for new ones."""
_PROBED = 16
"""Samples that are looked at before the rest is read."""


class Corrupted(Sequence[Any]):
    """Inputs of samples, each corrupted when it is read.

    What becomes of an input depends on its place in the samples, not on what was read before.
    Images are computed at every reading; texts, which are read several times, are kept.

    Args:
        inputs: the clean ones.
        corruption: what is done to them.
        severity: 1 to 5.
        key: what the randomness depends on besides corruption, severity and place.
        source: for messages.
    """

    def __init__(
        self, inputs: Sequence[Any], corruption: Corruption, severity: int, key: str, source: str
    ) -> None:
        self.inputs, self.corruption, self.severity = inputs, corruption, severity
        self._key, self._source = key, source
        self._texts: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.inputs)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= place < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        if self.corruption.kind == "image":
            return self._image(place)
        if place not in self._texts:
            self._texts[place] = self._text(place)
        return self._texts[place]

    def _image(self, place: int) -> Any:
        picture = open_picture(self.inputs[place], f"{self._source}: sample {place}")
        numbers = setting(self.corruption.name, self.severity, min(picture.pixels.shape[:2]))
        generator = np.random.Generator(np.random.SFC64(self._seed(place)))
        return picture.back(self.corruption.apply(picture.pixels, numbers, generator))

    def _text(self, place: int) -> Any:
        value = self.inputs[place]
        random = Random(self._seed(place))
        if isinstance(value, tuple):
            return tuple(self._one_text(part, place, random) for part in value)
        return self._one_text(value, place, random)

    def _one_text(self, value: Any, place: int, random: Random) -> str:
        if not isinstance(value, str):
            raise UsageError(f"{self._source}: sample {place} is a {type(value).__name__}, not a text")
        return corrupt_text(value, self.corruption.apply, self.severity, random)

    def _seed(self, place: int) -> int:
        parts = f"{self._key}\0{self.corruption.name}\0{self.severity}\0{place}"
        return int.from_bytes(hashlib.blake2b(parts.encode(), digest_size=16).digest(), "little")


def corrupt(samples: Samples, name: str, severity: int, *, seed: int = 0, stream: str = "") -> Samples:
    """The same samples under a corruption; labels are kept, inputs are computed as they are read.

    What becomes of a sample depends on seed, stream, corruption, severity and its place alone: the order in
    which samples are read and how they are batched do not matter.

    Args:
        samples: images or texts: whatever `open_picture` takes, texts, or pairs of texts.
        name: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: another seed gives other noise.
        stream: another stream gives other noise for the same seed: for a second split of a data set.

    Raises:
        UsageError: no such corruption (the nearest is named) or severity, or inputs that it is not for.
    """
    corruption = find(name)
    check_severity(severity)
    kind = kind_of(samples)
    if kind != corruption.kind:
        raise UsageError(f"the corruption '{name}' is for {corruption.kind}s; {_found(samples, kind)}")
    condition = f"{name}:{severity}"
    content = f"{samples.fingerprint}\0{_VERSION}\0{condition}\0{seed}\0{stream}"
    inputs = Corrupted(samples.inputs, corruption, severity, f"{seed}\0{stream}", samples.source)
    return Samples(
        inputs,
        samples.labels,
        f"{samples.source} ({condition})",
        hashlib.sha256(content.encode()).hexdigest(),
    )


def fits(samples: Samples) -> tuple[str, ...]:
    """Names of the corruptions that fit these inputs; none where they are neither images nor texts."""
    kind = kind_of(samples)
    return names_for(kind) if kind is not None else ()


def check_severity(severity: int) -> None:
    """Raise `UsageError` for what is no severity."""
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise UsageError(f"severity (={severity!r}) must be a whole number from 1 to 5")


def kind_of(samples: Samples) -> InputKind | None:
    """What the inputs are, from some of them: images, texts (a path to an image is an image), or neither."""
    step = max(1, len(samples) // _PROBED)
    some = [samples.inputs[place] for place in range(0, len(samples), step)]
    if not some:
        return None
    if all(may_be_picture(value) for value in some):
        return "image"
    return "text" if all(_is_text(value) for value in some) else None


def _is_text(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(isinstance(part, str) for part in value)
    return isinstance(value, str)


def _found(samples: Samples, kind: InputKind | None) -> str:
    if kind is not None:
        return f"the inputs of {samples.source} are {kind}s. For these there are: {', '.join(fits(samples))}"
    if not len(samples):
        return f"{samples.source} has no samples"
    for place, value in enumerate(samples.inputs[: _PROBED * 4]):
        try:
            open_picture(value, f"sample {place}")
        except UsageError as error:
            return f"the inputs of {samples.source} are neither images nor texts: {error}"
    return f"the inputs of {samples.source} are neither all images nor all texts"
