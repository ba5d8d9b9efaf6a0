"""The order of training samples, judged by its properties, whatever the algorithm.

Each sample is named by its source and by a digest of its content; blocks that hold the same text have the same digest.
"""

from collections import Counter
from collections.abc import Sequence

Sample = tuple[int, str]  # source, digest


def judge_epochs(samples: Sequence[Sample], blocks: int) -> list[str]:
    """Samples without weights of sources: each epoch of `blocks` has the same blocks, and not all have one order.

    Args:
        samples: of several epochs, so that chance does not make all of them alike.
    """
    epochs = [list(samples[at : at + blocks]) for at in range(0, len(samples) - blocks + 1, blocks)]
    if any(Counter(epoch) != Counter(epochs[0]) for epoch in epochs):
        return ["a later epoch does not read what the first one reads"]
    if len(set(epochs[0])) > 2 and all(epoch == epochs[0] for epoch in epochs[1:]):
        return ["all epochs have the order of the first"]
    return []


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


def judge_seeds(orders: Sequence[Sequence[str]]) -> list[str]:
    """Samples of several seeds, over the same text, come in several orders."""
    if len(set(orders[0])) > 2 and all(list(other) == list(orders[0]) for other in orders[1:]):
        return ["another run.seed gives the same order"]
    return []
