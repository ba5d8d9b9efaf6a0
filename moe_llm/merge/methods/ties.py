"""TIES, Yadav et al. 2023: trim each task vector to its largest elements, elect signs, average what agrees.

The trim keeps exactly max(1, floor(density * n)) elements of a tensor; of equal ones at the border, the first.
The border is found without sorting: floats that are not negative are ordered as their bits are, so a histogram
of the upper half of the bits, then one of the lower half within the bin that holds the border, gives it exactly.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

from moe_llm.merge.job import Combine, Job
from moe_llm.merge.methods import deltas

PARAMETERS = deltas.parameters(normalize=True, rescale=False)
_LOW_BITS = 15  # of the 31 below the sign


def start(job: Job) -> Combine:
    numel = math.prod(job.shape)
    trims = {i: Trim(numel, count_of(numel, job.inputs[i].parameters["density"])) for i in job.tasks}
    settle(job, trims, lambda i, parts: parts[i] - parts[job.origin])
    thin = Thinned({i: trim.keep for i, trim in trims.items()}, [trim.again for trim in trims.values()])
    return deltas.mix(job, thin.rescaled(job) if job.shared["rescale"] else thin, elect=True)


def count_of(numel: int, density: float) -> int:
    """How many elements a density keeps: at least one, unless it is 0."""
    return numel if density >= 1 else max(1, int(density * numel)) if density > 0 and numel else 0


class Trim:
    """Keeps the `count` largest magnitudes of one task vector that comes in spans, in order.

    border: bits of the smallest magnitude that is kept. ties: how many of that magnitude are.
    """

    def __init__(self, numel: int, count: int):
        self.count, self.whole = count, count == numel
        self.border, self.ties, self._left = 0, 0, 0
        self._high = torch.zeros(1 << 31 - _LOW_BITS, dtype=torch.int64)
        self._low = torch.zeros(1 << _LOW_BITS, dtype=torch.int64)

    def count_high(self, delta: torch.Tensor) -> None:
        _count(self._high, _bits(delta) >> _LOW_BITS)

    def settle_high(self) -> None:
        self._bin, self._wanted = _border(self._high, self.count)

    def count_low(self, delta: torch.Tensor) -> None:
        bits = _bits(delta)
        _count(self._low, bits[bits >> _LOW_BITS == self._bin] & ((1 << _LOW_BITS) - 1))

    def settle_low(self) -> None:
        low, self.ties = _border(self._low, self._wanted)
        self.border, self._left = (self._bin << _LOW_BITS) + low, self.ties
        del self._high, self._low

    def again(self) -> None:
        """Begin another pass."""
        self._left = self.ties

    def keep(self, delta: torch.Tensor) -> torch.Tensor:
        """The next span, with all but the largest set to 0."""
        return delta if self.whole else torch.where(self.mask(delta), delta, 0.0)

    def mask(self, delta: torch.Tensor) -> torch.Tensor:
        """Which elements of the next span are among the largest, bool."""
        if self.whole or not self.count:
            return torch.full_like(delta, self.whole, dtype=torch.bool)
        bits = _bits(delta)
        tied = (bits == self.border).nonzero()[:, 0]
        kept = bits > self.border
        kept[tied[: self._left]] = True
        self._left = max(0, self._left - len(tied))
        return kept


def _bits(delta: torch.Tensor) -> torch.Tensor:
    return delta.abs().view(torch.int32)


def _count(histogram: torch.Tensor, bins: torch.Tensor) -> None:
    histogram.scatter_add_(0, bins.long(), torch.ones_like(bins, dtype=torch.int64))


def _border(histogram: torch.Tensor, count: int) -> tuple[int, int]:
    """The bin of the element that is `count`-th from above, and its place in it, from 1."""
    above = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, count))
    before = int(above[place - 1]) if place else 0
    return len(histogram) - 1 - place, count - before


def settle(job: Job, trims: Mapping[int, Trim], value: Callable[[int, list[torch.Tensor]], torch.Tensor]) -> None:
    """Find the border of each trim, in two passes; `value`, given its key and a span of every input, is what it trims."""
    searched = {key: trim for key, trim in trims.items() if trim.count and not trim.whole}
    for look, finish in ((Trim.count_high, Trim.settle_high), (Trim.count_low, Trim.settle_low)):
        for _, parts in job.spans() if searched else ():
            for key, trim in searched.items():
                look(trim, value(key, parts))
        for trim in searched.values():
            finish(trim)


class Thinned:
    """A `deltas.Thin` of one function of a span for each task vector; all of `again` begin another pass of them."""

    def __init__(
        self, keep: Mapping[int, Callable[[torch.Tensor], torch.Tensor]], again: Sequence[Callable[[], None]] = ()
    ):
        self._keep, self._again = keep, again

    def __call__(self, i: int, start: int, delta: torch.Tensor) -> torch.Tensor:
        return self._keep[i](delta)

    def rescaled(self, job: Job) -> deltas.Thin:
        thin = deltas.rescaled(job, self)
        for begin in self._again:
            begin()
        return thin
