"""The order of training samples: a pure function of (seed, index), so a position is one number.

Nothing is drawn from a generator with a state: any process can ask for any sample.
"""

from collections.abc import Sequence

import numpy as np

_ROUNDS = 6
PERIOD = 2**16  # samples after which a mixture repeats its pattern: the resolution of weights


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
        share = np.array(weights, np.float64) / sum(weights) * PERIOD
        self.quota = np.maximum(1, np.floor(share).astype(np.int64))
        while (missing := PERIOD - int(self.quota.sum())) > 0:
            self.quota[np.argsort(self.quota - share, kind="stable")[:missing]] += 1
        self.quota[np.argmax(self.quota)] += missing  # what the smallest got beyond their share, if anything
        random = np.random.Generator(np.random.PCG64([seed, 0x6D6978]))
        source = np.repeat(np.arange(len(weights)), self.quota)
        # One sample in each of a source's equal stretches of the period, at a random place in it.
        rank = np.concatenate([np.arange(q) for q in self.quota])
        when = (rank + random.random(PERIOD)) / self.quota[source]
        order = np.argsort(when, kind="stable")
        self._source, self._rank = source[order], rank[order]

    def taken(self, samples: int) -> np.ndarray:
        """(sources,) how many of the first samples are of each source."""
        periods, slot = divmod(samples, PERIOD)
        return periods * self.quota + np.bincount(self._source[:slot], minlength=len(self.quota))

    def __call__(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, its samples so far) of each sample, (R,) int64 both."""
        period, slot = np.divmod(position, PERIOD)
        source = self._source[slot]
        return source, period * self.quota[source] + self._rank[slot]


class StagedMixture:
    """Mixtures that follow each other; each source goes on where the stage before has left it.

    Args:
        stages: (first sample, weights) of each, the first from sample 0; a source of weight 0 has no sample.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]], seed: int):
        assert stages[0][0] == 0, "every sample has a stage"
        self._begins = np.array([begin for begin, _ in stages], np.int64)
        self._members = [np.flatnonzero(weights) for _, weights in stages]
        self._mixtures = [Mixture([weight for weight in weights if weight], seed) for _, weights in stages]
        self._sources = len(stages[0][1])
        self._before = [np.zeros(self._sources, np.int64)]  # of each stage: samples of each source before it
        for stage in range(len(stages) - 1):
            length = int(self._begins[stage + 1] - self._begins[stage])
            self._before.append(self._before[stage] + self._taken_of(stage, length))

    def _taken_of(self, stage: int, samples: int) -> np.ndarray:
        found = np.zeros(self._sources, np.int64)
        found[self._members[stage]] = self._mixtures[stage].taken(samples)
        return found

    def taken(self, samples: int) -> np.ndarray:
        """(sources,) how many of the first samples are of each source."""
        stage = int(np.searchsorted(self._begins, samples, side="right")) - 1
        return self._before[stage] + self._taken_of(stage, samples - int(self._begins[stage]))

    def __call__(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, its samples so far) of each sample, (R,) int64 both."""
        source, nth = np.empty_like(position), np.empty_like(position)
        stages = np.searchsorted(self._begins, position, side="right") - 1
        for stage in np.unique(stages).tolist():
            here = stages == stage
            member, count = self._mixtures[stage](position[here] - self._begins[stage])
            source[here] = self._members[stage][member]
            nth[here] = self._before[stage][source[here]] + count
        return source, nth
