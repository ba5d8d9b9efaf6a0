"""TIES, Yadav et al. 2023: trim each task vector to its largest elements, elect signs, average what agrees.

The trim keeps exactly max(1, floor(density * n)) elements of a tensor; of equal ones at the border, the first.
The border is found without sorting: floats that are not negative are ordered as their bits are, so a histogram
of the upper half of the bits, then one of the lower half within the bin that holds the border, gives it exactly.
"""

import math

import torch

from moe_llm.merge.job import Combine, Job
from moe_llm.merge.methods import deltas

PARAMETERS = deltas.parameters(normalize=True, rescale=False)
_LOW_BITS = 15  # of the 31 below the sign


def start(job: Job) -> Combine:
    trims = _trims(job)
    if job.shared["rescale"]:
        _measure(job, trims)
    return deltas.mix(job, lambda i, _, delta: trims[i].keep(delta), elect=True)


class Trim:
    """Keeps the `count` largest magnitudes of one task vector that comes in spans, in order.

    border: bits of the smallest magnitude that is kept. ties: how many of that magnitude are.
    factor: on what is kept.
    """

    def __init__(self, numel: int, density: float):
        self.count = numel if density >= 1 else max(1, int(density * numel)) if density > 0 and numel else 0
        self.whole, self.factor = self.count == numel, 1.0
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
        if self.whole:
            return delta
        if not self.count:
            return torch.zeros_like(delta)
        bits = _bits(delta)
        tied = (bits == self.border).nonzero()[:, 0]
        kept = bits > self.border
        kept[tied[: self._left]] = True
        self._left = max(0, self._left - len(tied))
        return torch.where(kept, delta * self.factor, 0.0)


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


def _trims(job: Job) -> dict[int, Trim]:
    trims = {i: Trim(math.prod(job.shape), job.inputs[i].parameters["density"]) for i in job.tasks}
    searched = {i: trim for i, trim in trims.items() if trim.count and not trim.whole}
    for look, settle in ((Trim.count_high, Trim.settle_high), (Trim.count_low, Trim.settle_low)):
        for _, parts in job.spans() if searched else ():
            for i, trim in searched.items():
                look(trim, parts[i] - parts[job.base])
        for trim in searched.values():
            settle(trim)
    return trims


def _measure(job: Job, trims: dict[int, Trim]) -> None:
    """`rescale`: what is kept gets the L1 norm that the whole had."""
    sums = torch.zeros(len(job.inputs), 2, dtype=torch.float64)
    for _, parts in job.spans():
        for i, trim in trims.items():
            delta = parts[i] - parts[job.base]
            sums[i] += torch.stack([delta.abs().sum(), trim.keep(delta).abs().sum()])
    for i, trim in trims.items():
        before, after = sums[i].tolist()
        trim.factor = before / after if after > 0 else 1.0
        trim.again()
