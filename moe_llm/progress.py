"""Progress of what takes more than a moment: a bar on stderr, on a terminal alone and not with `--quiet`.

This file needs neither torch nor transformers, and loads rich only where a bar is shown.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
LIBRARIES = "loading libraries"  # torch and transformers take seconds to import
_quiet = False


def be_quiet(quiet: bool = True) -> None:
    """Show no bars from now on, or show them again; those of the hub and of `datasets` are off from then on."""
    global _quiet
    _quiet = quiet
    if quiet:  # read when these libraries are imported
        os.environ |= dict.fromkeys(("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"), "1")


def is_shown() -> bool:
    """Whether bars are shown: by rank 0, where stderr is a terminal, unless the user has asked for silence."""
    return not _quiet and os.environ.get("RANK", "0") == "0" and sys.stderr.isatty()


@contextlib.contextmanager
def progress(task: str, total: float | None = None, in_bytes: bool = False) -> Iterator[Callable[[float], None]]:
    """A bar while the block runs, which disappears with it. What is given takes the amount that has been done since its
    last call.

    Args:
        task: shown before the bar, as a verb: "merging".
        total: amount in all; None: unknown, and then the bar only shows that something happens, and for how long.
        in_bytes: the amount is bytes, and their rate is shown.
    """
    if not is_shown():
        yield lambda amount: None
        return
    from rich import progress as bars
    from rich.console import Console

    counts = (bars.DownloadColumn(), bars.TransferSpeedColumn()) if in_bytes else (bars.MofNCompleteColumn(),)
    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(bar_width=24),
        *(counts if in_bytes or total is not None else ()),
        bars.TimeElapsedColumn() if total is None else bars.TimeRemainingColumn(),
    )
    # only a terminal's output has to be kept out of the bar's line; a file's or a pipe's goes there as ever
    console, shared = Console(stderr=True), sys.stdout.isatty()
    with bars.Progress(*columns, console=console, transient=True, redirect_stdout=shared) as bar:
        number = bar.add_task(task, total=total)
        yield lambda amount: bar.advance(number, amount)


def tracked(items: Iterable[T], task: str, total: int | None = None) -> Iterator[T]:
    """The items, and a bar of how many have been dealt with. total: their number, where they have no length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(task, total) as advance:
        for item in items:
            yield item
            advance(1)
