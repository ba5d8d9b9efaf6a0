"""The order of training samples, judged by its properties, whatever the algorithm.

Each sample is named by its source and by a digest of its content; blocks that hold the same text have the same digest.
"""

from collections import Counter
from collections.abc import Sequence

Sample = tuple[int, str]  # source, digest


def judge_epochs(samples: Sequence[Sample], blocks: int) -> list[str]:
    """Samples without weights of sources: each epoch of `blocks` has the same blocks, and another order.

    Args:
        samples: of two epochs at least.
    """
    first, second = list(samples[:blocks]), list(samples[blocks : 2 * blocks])
    wrong = []
    if Counter(first) != Counter(second):
        wrong.append("the second epoch does not read what the first one reads")
    elif blocks > 8 and first == second:
        wrong.append("the second epoch has the order of the first")
    return wrong


def judge_repeats(samples: Sequence[Sample], blocks: int) -> list[str]:
    """Whether an epoch of `blocks` reads blocks again; the same text may stand in a few of them."""
    times = Counter(samples[:blocks])
    repeated = sum(count - 1 for count in times.values())
    if repeated > max(1, blocks // 10):
        return [f"{repeated} of an epoch's {blocks} blocks are read again before all have been read"]
    return []


def judge_weights(samples: Sequence[Sample], weights: Sequence[float]) -> list[str]:
    """Samples of weighted sources: each source has its share, to within a few samples."""
    total, count = sum(weights), len(samples)
    found = Counter(source for source, _ in samples)
    return [
        f"source {source} has {found[source]} of {count} samples, and its weight asks for {weight / total * count:.1f}"
        for source, weight in enumerate(weights)
        if abs(found[source] - weight / total * count) > len(weights) + 1
    ]


def judge_seeds(samples: Sequence[Sample], others: Sequence[Sample]) -> list[str]:
    """Samples of another seed come in another order."""
    if len(samples) > 8 and list(samples) == list(others):
        return ["another run.seed gives the same order"]
    return []
