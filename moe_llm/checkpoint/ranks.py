"""What checkpoints need of the ranks: that all of them learn what happened on one."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, overload

from moe_llm.errors import UserError

T = TypeVar("T")


class Ranks(Protocol):
    """Any group of processes that shares a file system; every `TrainedState` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def gather(self, value: Any) -> Sequence[Any]:
        """The small Python objects of all ranks, on every rank; also a barrier."""


class Alone:
    """The group of one process."""

    rank = 0
    world_size = 1

    def gather(self, value: Any) -> Sequence[Any]:
        return [value]


ALONE = Alone()


@overload
def together(ranks: Ranks, work: Callable[[], T], *, only: None = None) -> T: ...


@overload
def together(ranks: Ranks, work: Callable[[], T], *, only: int) -> T | None: ...


def together(ranks: Ranks, work: Callable[[], T], *, only: int | None = None) -> T | None:
    """Do `work` on every rank (or on rank `only`) and return this rank's result; where one fails, all raise.

    Collective. No rank waits at a barrier for one that has failed. `work` may itself be collective only if it
    goes through its collective calls whatever else fails.

    Raises:
        UserError: the failure was the user's, or the file system's, on some rank.
        RuntimeError: any other failure on another rank; on its own rank the exception itself.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        if only is None or ranks.rank == only:
            result = work()
    except Exception as error:  # noqa: BLE001 (raised below, when all ranks know)
        failure = error
    told = None if failure is None else (isinstance(failure, (UserError, OSError)), describe(failure))
    outcomes = ranks.gather(told)
    if failure is not None and not isinstance(failure, OSError):
        raise failure
    for rank, outcome in enumerate(outcomes):
        if outcome is not None:
            users, sentence = outcome
            if users:
                raise UserError(sentence) from failure
            raise RuntimeError(f"rank {rank}: {sentence}")
    return result


def describe(error: Exception) -> str:
    """One sentence for an exception; of a failing file system, with the file."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        where = f"file {error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    return f"{type(error).__name__}: {error}"
