"""Random numbers that depend on what they are for, not on when or in which order they are drawn.

A counter-based generator gives the number for position i of a tensor directly, so the same seed gives
the same merge whatever the chunk size, the number of threads and the order of the experts.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

_PER_COUNTER = 16  # one step of Philox gives four 64-bit words, sixteen 16-bit numbers


def below(probability: float | Tensor, seed: int, task: str, name: str, start: int, stop: int) -> Tensor:
    """Independent draws of "u < probability" for positions ``[start, stop)`` of one expert's tensor.

    Args:
        probability: one number, resolved to 1/65536, or one for each position ``(stop - start,)``.

    Returns:
        bool ``(stop - start,)``.
    """
    draws = _uint16(seed, task, name, start, stop)
    threshold = probability * 65536
    if isinstance(threshold, Tensor):
        return draws.to(torch.int32) + 32768 < threshold.round()
    if round(threshold) >= 65536:
        return torch.ones_like(draws, dtype=torch.bool)
    return torch.from_numpy(draws.numpy() < round(threshold) - 32768)  # ten times as fast as torch's own


def resolved(probability: float) -> float:
    """The probability that `below` really has."""
    return round(probability * 65536) / 65536


def _uint16(seed: int, task: str, name: str, start: int, stop: int) -> Tensor:
    """Uniform 16-bit numbers shifted to int16 (each minus 32768)."""
    digest = hashlib.blake2b(f"{seed}\0{task}\0{name}".encode(), digest_size=16).digest()
    first = start // _PER_COUNTER
    generator = np.random.Philox(key=int.from_bytes(digest, "little"), counter=first)
    count = stop - first * _PER_COUNTER
    words = generator.random_raw(-(-count // 4))
    return torch.from_numpy(words.view(np.int16))[start - first * _PER_COUNTER : count]
