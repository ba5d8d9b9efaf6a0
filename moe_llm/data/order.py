"""The order of training samples: a pure function of (seed, index), so a position is one number.

Nothing is drawn from a generator with a state: any process can ask for any sample.
"""

import numpy as np

_ROUNDS = 6
_PERIOD = 2**16  # samples after which a mixture repeats its pattern: the resolution of weights


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): uint64 to uint64, a bijection that scatters well."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, length: int, keys: np.ndarray) -> np.ndarray:
    """Where each index goes in a random permutation of range(length).

    A Feistel network over the next even number of bits, walked until it lands inside (Black and Rogaway
    2002): O(1) memory, however large the corpus.

    Args:
        index: (R,) integers in [0, length).
        keys: (R,) uint64; indices of equal key share a permutation.

    Returns:
        (R,) int64.
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    # Multiplied as Python integers: numpy warns when a scalar wraps around.
    round_constants = [np.uint64(0x9E3779B97F4A7C15 * r % 2**64) for r in range(1, _ROUNDS + 1)]
    result = index.astype(np.uint64)
    walking = np.ones(len(result), bool)
    while walking.any():
        left, right, key = result[walking] >> half, result[walking] & mask, keys[walking]
        for round_ in range(_ROUNDS):
            key = mix(key + round_constants[round_])
            left, right = right, left ^ (mix(right + key) & mask)
        result[walking] = (left << half) | right
        walking = result >= np.uint64(length)
    return result.astype(np.int64)


def shuffled(position: np.ndarray, length: int, seed: int, stream: int) -> np.ndarray:
    """Sample at each position of an endless sequence: epoch after epoch, each in an order of its own."""
    epoch, index = np.divmod(position.astype(np.uint64), np.uint64(length))
    root = np.array([seed, stream], dtype=np.uint64)
    key = mix(mix(mix(root[:1]) + root[1:]) + epoch)
    return permute(index, length, key)


def drawn(index: np.ndarray, length: int, seed: int, stream: int) -> np.ndarray:
    """A draw from range(length) with replacement for each index: the same for the same seed, stream and index."""
    root = np.array([seed, stream], dtype=np.uint64)
    key = mix(mix(mix(root[:1] + np.uint64(0x626F6F74)) + root[1:]) + index.astype(np.uint64))
    return (key % np.uint64(length)).astype(np.int64)


class Mixture:
    """Which source each sample comes from, by weight, and how many of that source came before.

    In any stretch of samples each source has its share, to within a few samples. Weights are
    rounded to 1/65536, and none is rounded to zero.
    """

    def __init__(self, weights: list[float], seed: int):
        share = np.array(weights, np.float64) / sum(weights) * _PERIOD
        self.quota = np.maximum(1, np.floor(share).astype(np.int64))
        while (missing := _PERIOD - int(self.quota.sum())) > 0:
            self.quota[np.argsort(self.quota - share, kind="stable")[:missing]] += 1
        self.quota[np.argmax(self.quota)] += missing  # what the smallest got beyond their share, if anything
        random = np.random.Generator(np.random.PCG64([seed, 0x6D6978]))
        source = np.repeat(np.arange(len(weights)), self.quota)
        # One sample in each of a source's equal stretches of the period, at a random place in it.
        rank = np.concatenate([np.arange(q) for q in self.quota])
        when = (rank + random.random(_PERIOD)) / self.quota[source]
        order = np.argsort(when, kind="stable")
        self._source, self._rank = source[order], rank[order]

    def __call__(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, its samples so far) of each sample, (R,) int64 both."""
        period, slot = np.divmod(position, _PERIOD)
        source = self._source[slot]
        return source, period * self.quota[source] + self._rank[slot]
