"""The exponential average of the weights, from its formula: bias-corrected as Adam's moments are (Kingma and Ba 2015,
section 3), so that weights t updates old count decay^t and all weights of the past sum to 1."""

from collections.abc import Mapping, Sequence

import numpy as np


def average(weights: Sequence[Mapping[str, np.ndarray]], decay: float) -> dict[str, np.ndarray]:
    """Of the weights after each update, the newest last."""
    shares = np.array([decay**age for age in range(len(weights) - 1, -1, -1)], np.float64)
    shares /= shares.sum()
    return {
        name: sum(share * held[name].astype(np.float64) for share, held in zip(shares, weights)).astype(np.float32)
        for name in weights[0]
    }
