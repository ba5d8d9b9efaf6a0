"""The watch over a start, from its first line until the watchdog takes over: says what is waited for, and ends a hang."""

import faulthandler
import logging
import os
import threading
import time
from types import TracebackType

from moe_llm import locks
from moe_llm.distributed.runtime import longest_wait_seconds, rank_from_environment

logger = logging.getLogger(__name__)

EXIT_HUNG = 1
SAY_EVERY_SECONDS = 60.0
_running: "list[StartWatch]" = []


class StartWatch:
    """Use as a context manager around a run; `watchdog_takes_over` ends it earlier.

    A phase that lasts is reported every minute. The process ends with its stacks and exit code 1 when a phase that is
    quick by nature (joining the process group, building the engine) takes longer than `timeout`, or any other, such as
    tokenising or waiting for ranks that do, longer than an exchange between ranks may.

    Args:
        timeout: `train.hang_timeout_seconds`; None: phases are reported, and nothing is ended.
    """

    def __init__(self, timeout: float | None):
        self._timeout, self._longest = timeout, longest_wait_seconds(timeout)
        self._phase, self._quick, self._progress = "reading the configuration", False, time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="start_watch", daemon=True)

    def __enter__(self) -> "StartWatch":
        locks.listeners.append(self._heartbeat)
        _running.append(self)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        if self in _running:
            _running.remove(self)
            locks.listeners.remove(self._heartbeat)
        self._over.set()

    def _heartbeat(self, phase: str, quick: bool) -> None:
        self._phase, self._quick, self._progress = phase, quick, time.monotonic()

    def _watch(self) -> None:
        said, before = "", time.monotonic()
        next_word = SAY_EVERY_SECONDS
        while not self._over.wait(min(1.0, SAY_EVERY_SECONDS / 4)):
            now = time.monotonic()
            if now - before > 10:  # this process was stopped itself
                self._progress = now
            before, waited = now, now - self._progress
            if self._phase != said or waited < SAY_EVERY_SECONDS:
                said, next_word = self._phase, SAY_EVERY_SECONDS
            if waited >= next_word:
                next_word += SAY_EVERY_SECONDS
                locks.complain(f"still starting, for {waited:.0f} s in: {self._phase}")
            if self._timeout is not None and waited > (self._timeout if self._quick else self._longest):
                self._end(waited)

    def _end(self, waited: float) -> None:
        logger.error(
            f"rank {rank_from_environment()} has not started, for {waited:.0f} s in: {self._phase}\n"
            "  see that all ranks were launched and reach each other, or raise train.hang_timeout_seconds"
        )
        faulthandler.dump_traceback(all_threads=True)
        os._exit(EXIT_HUNG)  # not an exception: the main thread is where it hangs


def watchdog_takes_over() -> None:
    """End the watch over the start, if there is one: training begins."""
    for watch in list(_running):
        watch.end()
