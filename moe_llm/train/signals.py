"""Ctrl-C and SIGTERM ask the loop to save and stop; a second Ctrl-C stops at once."""

import signal
from types import FrameType
from typing import Any


class StoppedEarly(KeyboardInterrupt):
    """Asked to stop while there was nothing to save yet."""


class StopRequest:
    """Remembers that the process was asked to stop. Use as a context manager around the run.

    Preparation (tokenising may take hours) has nothing to save, so until `defer` is called a request raises
    `StoppedEarly` where the process is; from then on the loop asks for `requested` after each step.
    """

    def __init__(self) -> None:
        self.requested = False
        self.number: int | None = None  # of the first signal
        self._deferred = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on there is something to save."""
        self._deferred = True

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.number = self.number or number
        if not self._deferred:
            raise StoppedEarly
        self.requested = True
