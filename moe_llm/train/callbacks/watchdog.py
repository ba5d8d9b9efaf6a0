"""Ends a rank that waits for nothing: one that hangs itself, or whose peer is dead, stopped or out of reach.

A rank that waits in an exchange for one that never comes waits for hours, and keeps its GPUs. So each rank has a
thread that knows when its rank last showed progress, tells the others that it lives, and ends the process with a
message when nothing can come any more. The launcher then ends the rest, and restarts them if it was asked to.
"""

import faulthandler
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from moe_llm.distributed.runtime import Runtime
from moe_llm.distributed.store import connect
from moe_llm.train.callbacks.base import Callback, TrainingRun
from moe_llm.train.start_watch import EXIT_HUNG, watchdog_takes_over

logger = logging.getLogger(__name__)

# A live process answers within seconds, whatever its training does
SILENCE_SECONDS = 25.0
_BEAT_SECONDS = 2.0


@dataclass
class _Peer:
    """What a rank last said, and when it was heard."""

    said: str = "nothing yet"
    heard: float = 0.0


class Watchdog:
    """Use as a context manager around the training loop, on all ranks; `heartbeat` is progress.

    The process ends with a message on stderr, its stack and exit code 1 when
    - there was no progress for `timeout` seconds, or
    - a peer's process was silent for `SILENCE_SECONDS` while this rank made no progress either.
    A time in which this process itself was stopped (Ctrl-Z, a suspended machine) does not count.

    Args:
        timeout: seconds; None: no watching at all.
    """

    def __init__(self, runtime: Runtime, timeout: float | None):
        self._rank, self._ranks, self._timeout = runtime.rank, runtime.world_size, timeout
        self._phase, self._progress = "start", time.monotonic()
        self._peers = {rank: _Peer() for rank in range(self._ranks) if rank != self._rank}
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._stores = connect(runtime) if timeout is not None and self._ranks > 1 else None

    def heartbeat(self, phase: str) -> None:
        """Progress was made, and `phase` comes next."""
        self._phase, self._progress = phase, time.monotonic()

    def __enter__(self) -> "Watchdog":
        watchdog_takes_over()
        if self._timeout is not None:
            self.heartbeat("start")
            for peer in self._peers.values():
                peer.heard = time.monotonic()
            self._start(self._watch)
            if self._stores is not None:
                self._start(self._tell)
                self._start(self._listen)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(_BEAT_SECONDS)

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _watch(self) -> None:
        """Talks to no one, so that nothing can hold it up."""
        assert self._timeout is not None
        interval = min(1.0, self._timeout / 4)
        silence = min(SILENCE_SECONDS, self._timeout)
        before = time.monotonic()
        while not self._over.wait(interval):
            now = time.monotonic()
            if now - before > 5 * interval + 1:  # this process was stopped itself
                self._progress = now
                for peer in self._peers.values():
                    peer.heard = now
            before = now
            waited = now - self._progress
            silent = [rank for rank, peer in self._peers.items() if now - peer.heard > silence]
            if waited > self._timeout or (silent and waited > silence):
                self._end(now, waited, silent)

    def _end(self, now: float, waited: float, silent: list[int]) -> None:
        lines = [f"rank {self._rank} has made no progress for {waited:.0f} s in: {self._phase}"]
        for rank in silent:
            lines.append(
                f"  rank {rank} has died, was stopped or is out of reach: silent for "
                f"{now - self._peers[rank].heard:.0f} s, its last words: {self._peers[rank].said}"
            )
        lines += [f"  rank {rank} lives, in: {peer.said}" for rank, peer in self._peers.items() if rank not in silent]
        if not silent:
            lines.append("  raise train.hang_timeout_seconds if a step may take so long")
        logger.error("\n".join(lines))
        faulthandler.dump_traceback(all_threads=True)
        # Not an exception: the main thread is where it hangs
        os._exit(EXIT_HUNG)

    def _tell(self) -> None:
        assert self._stores is not None
        number = 0
        while not self._over.is_set():
            number += 1
            try:
                self._stores[0].set(f"rank{self._rank}", f"{number}/{self._phase}")
            except RuntimeError:
                return  # the store has gone with rank 0, whose silence `_watch` notices
            self._over.wait(_BEAT_SECONDS)

    def _listen(self) -> None:
        assert self._stores is not None
        keys = [f"rank{rank}" for rank in self._peers]
        numbers: dict[int, str] = {}
        while not self._over.is_set():
            try:
                for rank, words in zip(self._peers, self._stores[1].multi_get(keys)):
                    number, _, said = words.decode().partition("/")
                    if numbers.get(rank) != number:
                        numbers[rank] = number
                        self._peers[rank].said, self._peers[rank].heard = said, time.monotonic()
            except RuntimeError:
                numbers.clear()  # nothing heard, which `_watch` notices; a store that was only slow is asked again
            self._over.wait(_BEAT_SECONDS)


class WatchdogCallback(Callback):
    """Watches a run from its first step to its last (`train.hang_timeout_seconds`)."""

    _watchdog: Watchdog | None = None

    def on_train_begin(self, run: TrainingRun) -> None:
        self._watchdog = Watchdog(run.runtime, run.config.train.hang_timeout_seconds)
        self._watchdog.__enter__()

    def on_heartbeat(self, run: TrainingRun, phase: str) -> None:
        if self._watchdog is not None:
            self._watchdog.heartbeat(phase)

    def on_close(self, run: TrainingRun) -> None:
        if self._watchdog is not None:
            self._watchdog.__exit__()
