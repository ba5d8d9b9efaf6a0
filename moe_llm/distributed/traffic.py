"""What the exchanges of a layer's experts cost."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Traffic:
    """What a layer has exchanged since it was last read: forward, backward and recomputation alike.

    Bytes are those that leave this rank; seconds are the time that this rank waited for exchanges, on CUDA measured
    by events on the stream, so that nothing is synchronised for it.
    """

    def __init__(self):
        self.bytes = 0
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            return
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def take(self) -> tuple[int, float]:
        """(bytes, seconds), and start over."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += begin.elapsed_time(end) / 1e3
        taken = self.bytes, self._seconds
        self.__init__()
        return taken
