"""Room for a checkpoint, and what is said where there is none."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from moe_llm.atomic import is_full
from moe_llm.checkpoint.export import DTYPES
from moe_llm.checkpoint.folder import probe
from moe_llm.checkpoint.plan import WritePlan, make_plan
from moe_llm.checkpoint.ranks import describe, together
from moe_llm.config.base import parse_size
from moe_llm.distributed.state import TrainedState
from moe_llm.errors import UserError

T = TypeVar("T")
_SMALL_FILES = 1 << 24  # bytes allowed for headers, indices and tokenizer when the space is checked


def check_space(root: str | Path, state: TrainedState, *, dtype: str = "fp32", max_shard_size: str = "5GB") -> None:
    """Refuse a disk that has no room for the first checkpoint, or a file system on which it cannot be written, before
    a run spends hours on it; what it cannot do and a run can do without is reported. Collective.

    Args: as of `save_checkpoint`; `root` need not exist.

    Raises:
        UserError: on every rank.
    """
    root = Path(root)
    plan = make_plan(state, DTYPES[dtype], parse_size(max_shard_size), state.averages)

    def check() -> None:
        check_room(root, "step-*", plan)
        probe(root)

    together(state, naming_failure(root, root / "step-*", plan, check), only=0)


def check_room(root: Path, name: str, plan: WritePlan) -> None:
    """Refuse a disk that has no room for what a plan writes.

    Raises:
        UserError: it names the checkpoint and what is free.
    """
    there = next(path for path in [root, *root.absolute().parents] if path.exists())
    free, needed = shutil.disk_usage(there).free, plan.nbytes + _SMALL_FILES
    if free < needed:
        raise UserError(_no_space(name, root, needed, free))


def _no_space(name: str, root: Path, needed: int, free: int) -> str:
    return (
        f"no space left for checkpoint {root / name}: it needs {needed / 1e9:.3g} GB and {free / 1e9:.3g} GB "
        "are free: free some space, lower checkpoint.keep_last or move run.dir"
    )


def naming_failure(root: Path, final: Path, plan: WritePlan, work: Callable[[], T]) -> Callable[[], T]:
    """`work`, but a failure of the file system becomes one sentence that names the checkpoint."""

    def wrapped() -> T:
        try:
            return work()
        except OSError as error:
            if is_full(error):
                free = shutil.disk_usage(root).free
                raise UserError(_no_space(final.name, root, plan.nbytes + _SMALL_FILES, free)) from error
            raise UserError(
                f"checkpoint {final} cannot be written: {describe(error)}: mend the file system or move run.dir"
            ) from error

    return wrapped
