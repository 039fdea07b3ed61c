"""How far a score could lie off by the choice of samples alone."""

from __future__ import annotations

import numpy as np

SEED = 0


def accuracy_interval(
    correct: int, samples: int, resamples: int = 1000, *, seed: int = SEED
) -> tuple[float, float]:
    """The bootstrap 95 % interval of an accuracy (percentiles 2.5 and 97.5).

    Drawing N of N right-or-wrong samples with replacement gives a binomial number of right ones, so that no
    sample need be drawn one by one.

    Args:
        correct: samples that are right.
        samples: of so many.
        resamples: how often to draw; 0 gives the accuracy itself as both ends.
        seed: of the draws.

    Returns:
        Lower and upper end.
    """
    share = correct / samples
    if resamples == 0:
        return share, share
    drawn = np.random.default_rng(seed).binomial(samples, share, resamples) / samples
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)
