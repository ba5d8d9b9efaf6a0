"""What the exchanges of a layer's experts cost."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Pairs of timing events that a layer has on CUDA. A micro-batch makes 26 of them with two chunks and recomputation; those
# after the first 32 since the last record are counted, and taken to last as long as these.
TIMED = 32


class Traffic:
    """What a layer has exchanged since it was last read: forward, backward and recomputation alike.

    Bytes are those that leave this rank; seconds are the time that this rank waited for exchanges. On CUDA they are
    measured by events on the stream, so that nothing is synchronised for it, and by a sample, so that the number of events
    does not grow with the number of micro-batches: the same `TIMED` pairs serve each time.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._seconds = 0.0
        self._waits = 0
        self._timed = 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Count the time that the block waits, on the host or on the device's stream."""
        if device.type == "cuda":
            self._waits += 1
            if self._timed == TIMED:
                yield
                return
            if self._timed == len(self._events):
                self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            begin, end = self._events[self._timed]
            self._timed += 1
            begin.record()
            yield
            end.record()
            return
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def take(self) -> tuple[int, float]:
        """(bytes, seconds), and start over."""
        for begin, end in self._events[: self._timed]:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        if self._timed:
            self._seconds *= self._waits / self._timed
        taken = self.bytes, self._seconds
        self.bytes, self._seconds, self._waits, self._timed = 0, 0.0, 0, 0
        return taken
