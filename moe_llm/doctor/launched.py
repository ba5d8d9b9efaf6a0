"""Ranks that a launcher has started, on whatever devices it gave them, for the doctor to examine.

Rank 0's process conducts: it prepares the text, compares, and trains alone where one process is asked for. So that it
is alone, a child of it takes its place among the ranks and hands on what they are to do. The other ranks' processes do
that themselves (`take_part`).
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from moe_llm.config import Config
from moe_llm.distributed.runtime import Runtime, start
from moe_llm.distributed.side_group import SideGroup
from moe_llm.distributed.store import connect
from moe_llm.doctor.ranks import ENDED, RAISED, VALUE, LocalRanks, Plant, RankError, answer_of, error_of, no_plant
from moe_llm.errors import UserError

ANSWER_SECONDS = 1800.0
_ANOTHER_RAISED = 87  # exit code of rank 0's child, whose last words are the trace
_SETTLING_SECONDS = 60.0
_GRACE, _POLL = 3.0, 0.5  # seconds: that the others get to raise too, and between looks
# what tells a process that a launcher has started it
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PREFIXES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "ACCELERATE_")


@dataclass
class _Group:
    """The ranks, as one of them sees them. stores: to write to and to read from (`connect`); None where it is alone."""

    runtime: Runtime
    side: SideGroup
    stores: tuple | None

    @classmethod
    def join(cls, config: Config) -> "_Group":
        runtime = start(config)
        _be_alone_to_transformers(runtime)
        return cls(runtime, SideGroup(runtime), connect(runtime) if runtime.world_size > 1 else None)

    def work(self, function: Callable[..., Any], args: tuple, plant: Plant) -> list[tuple[str, Any]]:
        """Do it together; the answers of all ranks. A rank that raises says so at once, since the others may wait for
        it in an exchange."""
        answer = answer_of(self.runtime.rank, function, args, plant)
        _be_alone_to_transformers(self.runtime)
        if answer[0] == RAISED and self.stores is not None:
            self.stores[0].set("raised", answer[1])
        return list(self.side.gather(answer))

    def raised(self) -> str | None:
        """The trace of a rank that has raised."""
        if self.stores is None or not self.stores[1].check(["raised"]):
            return None
        return self.stores[1].get("raised").decode()


_joined: _Group | None = None


def take_part(config: Config) -> None:
    """Do what rank 0 asks for until it has no more. On every rank but rank 0.

    Args:
        config: of the layout in which the ranks meet.
    """
    group = _Group.join(config)
    while (work := group.side.gather(None)[0]) is not None:
        group.work(*work)
    group.runtime.close()


def _hand_on(config: Config, function: Callable[..., Any] | None, args: tuple, plant: Plant) -> list[tuple[str, Any]]:
    """In the child of rank 0's process: have all ranks do something, or end where it is None."""
    global _joined
    if _joined is None:
        _joined = _Group.join(config)
    if function is None:
        _joined.side.gather(None)
        _joined.runtime.close()
        return []
    _joined.side.gather((function, args, plant))
    with _until_one_raises(_joined):
        return _joined.work(function, args, plant)


@contextlib.contextmanager
def _until_one_raises(group: _Group) -> Iterator[None]:
    """Meanwhile a thread looks whether another rank has raised, and after a little while ends this process with its
    trace: the exchange that it waits in will not come to an end."""
    over = threading.Event()

    def look() -> None:
        while not over.wait(_POLL):
            trace = group.raised()
            if trace is not None and not over.wait(_GRACE):
                print(trace, flush=True)
                os._exit(_ANOTHER_RAISED)

    thread = threading.Thread(target=look, name="doctor_look", daemon=True)
    if group.stores is not None:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join()


def _be_alone_to_transformers(runtime: Runtime) -> None:
    """Otherwise transformers would load every model together with all ranks, as ZeRO-3 asks it to."""
    if runtime.deepspeed:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


class LaunchedRanks(LocalRanks):
    """All ranks of a launcher, from rank 0's process: a context manager, in which that process is none of them."""

    def __init__(self, config: Config, ranks: int, timeout: float = ANSWER_SECONDS):
        super().__init__(1, timeout)
        self._config, self._ranks = config, ranks
        self._environment_before: dict[str, str] = {}

    def __enter__(self) -> "LaunchedRanks":
        self.start()
        self._environment_before = {name: os.environ.pop(name) for name in list(os.environ) if _of_a_launcher(name)}
        return self

    def close(self) -> None:
        if self._processes and not self._at_work:
            with contextlib.suppress(Exception):  # they end with the launcher, too
                super().send(_hand_on, self._config, None, (), no_plant)
                super().receive()
        super().close()
        os.environ.update(self._environment_before)

    def start(self) -> None:
        if self._environment_before:
            raise UserError("the ranks have ended, and only the launcher can start them again")
        super().start()

    def send(self, function: Callable[..., Any], *args: Any, plant: Plant = no_plant) -> None:
        super().send(_hand_on, self._config, function, args, plant)

    def receive(self) -> list[Any]:
        (answers,) = super().receive()
        failures = [answer for answer in answers if answer[0] != VALUE]
        if failures:
            raise error_of(failures)
        return [value for _, value in answers]

    def settle(self) -> None:
        """What nobody has received is waited for, for a while: the launcher's ranks cannot be started again."""
        if self._at_work:
            self.timeout = min(self.timeout, _SETTLING_SECONDS)
            with contextlib.suppress(RankError):
                self.receive()
        super().settle()

    def _answer(self, rank: int) -> tuple[str, Any]:
        kind, said = super()._answer(rank)
        if kind == ENDED and self._processes[rank].exitcode == _ANOTHER_RAISED:
            return RAISED, said
        return kind, said

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        """The launcher's."""
        return {}


def _of_a_launcher(name: str) -> bool:
    return name in _OF_A_LAUNCHER or (name.startswith(_PREFIXES) and name != "ACCELERATE_USE_CPU")
