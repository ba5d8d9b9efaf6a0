"""A run on a CPU that it shares: it takes a thread less for each core that other processes keep busy.

The threads of a matrix product wait for the slowest of them. Where another process takes half of one core, all of them
run at half their speed; one thread less, on cores of its own, loses only that core. Our kernels give the same bits with
any number of threads; torch's products may not, which is why `train.deterministic` leaves the number alone.
"""

import math
import os
import time
from pathlib import Path

import torch

from moe_llm.threads import cores
from moe_llm.train.callbacks.base import Callback, TrainingRun

_INTERVAL_SECONDS = 1.0
# A core counts as taken from so much of it on, and as free again below so little: what lies between changes nothing
_TAKEN, _FREE = 0.6, 0.3
_STAT = Path("/proc/stat")
_BUSY_FIELDS = (
    0,
    1,
    2,
    5,
    6,
)  # user, nice, system, irq, softirq; what a hypervisor takes is no process of ours to avoid


def busy_seconds() -> float | None:
    """Seconds for which the cores that this process may use have worked since the machine was started, all processes
    together; None where the system does not tell."""
    try:
        lines = [line.split() for line in _STAT.read_text(encoding="ascii").splitlines()]
        names = {f"cpu{core}" for core in cores()}
        ticks = sum(int(line[1 + field]) for line in lines if line[0] in names for field in _BUSY_FIELDS)
    except (OSError, ValueError, IndexError):
        return None
    return ticks / os.sysconf("SC_CLK_TCK")


def cores_taken(others: float, now: int) -> int:
    """How many cores are left to others that used `others` of them, where `now` were left to them before."""
    return max(math.floor(others + 1 - _TAKEN), min(now, math.ceil(others - _FREE)), 0)


class SharedCores(Callback):
    """Looks once a second, between steps."""

    def __init__(self) -> None:
        self._threads = 1
        self._taken = 0
        self._since: tuple[float, float, float] | None = None

    def on_train_begin(self, run: TrainingRun) -> None:
        self._threads = torch.get_num_threads()
        if run.runtime.device.type == "cpu" and run.runtime.world_size == 1 and self._threads > 1:
            self._since = self._reading()

    def on_step_end(self, run: TrainingRun) -> None:
        if self._since is None or time.monotonic() - self._since[0] < _INTERVAL_SECONDS:
            return
        now = self._reading()
        if now is None:
            return
        seconds, own, all_processes = (after - before for after, before in zip(now, self._since, strict=True))
        self._since = now
        taken = min(cores_taken((all_processes - own) / seconds, self._taken), self._threads - 1)
        if taken != self._taken:
            self._taken = taken
            torch.set_num_threads(self._threads - taken)
            run.say(
                f"other processes keep {taken} of {self._threads} cores busy: computing on {self._threads - taken}"
                if taken
                else f"no other process keeps a core busy any more: computing on {self._threads}"
            )

    def on_train_end(self, run: TrainingRun) -> None:
        if self._taken:
            torch.set_num_threads(self._threads)
        self._taken, self._since = 0, None

    @staticmethod
    def _reading() -> tuple[float, float, float] | None:
        """Of the clock, of this process and of all processes, in seconds."""
        busy = busy_seconds()
        return None if busy is None else (time.monotonic(), time.process_time(), busy)
