"""Messages of a command on stderr, in one style; modules log through `logging.getLogger(__name__)`.

Rank 0 shows notes and warnings. Errors are shown by every rank, as are records that say so with `ON_EVERY_RANK`; these
begin with the rank's number. This file needs neither torch nor transformers.
"""

import logging
import os
import sys
from typing import Any

ON_EVERY_RANK: dict[str, Any] = {"extra": {"on_every_rank": True}}


class _Handler(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is when a record comes."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:  # type: ignore[override]
        return sys.stderr

    def filter(self, record: logging.LogRecord) -> bool:
        everywhere = record.levelno >= logging.ERROR or getattr(record, "on_every_rank", False)
        return (everywhere or _rank() == "0") and bool(super().filter(record))

    def format(self, record: logging.LogRecord) -> str:
        whose = f"moe-llm: rank {_rank()}: " if getattr(record, "on_every_rank", False) else ""
        kind = "moe-llm: error: " if record.levelno >= logging.ERROR else ""
        return f"{kind or whose}{record.getMessage()}"


def _rank() -> str:
    return os.environ.get("RANK", "0")


def show_messages(command: bool = False, quiet: bool = False) -> None:
    """Show the package's messages on stderr.

    Args:
        command: also where the process has a handler of another kind already, which a program that imports the package may
            have set up to its own taste.
        quiet: warnings and errors alone, no notes.
    """
    logger, elsewhere = logging.getLogger("moe_llm"), bool(logging.getLogger().handlers)
    level = logging.WARNING if quiet else logging.INFO
    if any(isinstance(handler, _Handler) for handler in logger.handlers):
        logger.setLevel(level)
        return
    if elsewhere and not command:
        return
    logger.addHandler(_Handler())
    logger.setLevel(level)
    logger.propagate = elsewhere
