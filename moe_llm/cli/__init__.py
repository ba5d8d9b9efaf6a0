"""`moe-llm ...`: parse, then one call.

Nothing heavy is imported up here: `moe-llm --help` answers before torch would have begun to load, and a
mistake in a configuration is reported before the code that would have used it is imported.

    registry.py     the commands by group; a new command is one function in a group's file and one line there
    train.py, look.py, combine.py, check.py    the groups
    parser.py       help by group, nearest names for mistyped words
    arguments.py    kinds of arguments and of output that commands share
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence

from moe_llm.atomic import is_full, is_refusal
from moe_llm.cli.pages import page_for
from moe_llm.cli.registry import parse
from moe_llm.errors import Stopped, TrainingFailure, UserError
from moe_llm.logs import show_messages
from moe_llm.progress import be_quiet
from moe_llm.threads import wait_briefly

logger = logging.getLogger(__name__)

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit code: 0, 1 where a check finds a fault, training cannot continue or the
    output cannot be written, 2 for a user's mistake, 130 for Ctrl-C and 143 for SIGTERM, once a run is saved, and 141
    where the reader of the output has gone."""
    wait_briefly()  # before any command loads torch
    _print_any_character()
    show_messages(command=True)

    words = sys.argv[1:] if argv is None else argv

    def command() -> int | None:
        args = parse(words)
        quiet = getattr(args, "quiet", False)
        show_messages(command=True, quiet=quiet)
        be_quiet(quiet)
        return args.handler(args)

    return run_command(command, words[0] if words else "")


def run_command(command: Callable[[], int | None], name: str = "train") -> int:
    """Call `command`, which may return an exit code, and turn a `UserError` into one line on stderr and exit code 2,
    a `TrainingFailure` likewise into 1, Ctrl-C into 130. On a terminal a second line names the page that helps; `name` is the
    command's.

    With several ranks each of them exits with the code, and rank 0 alone prints: these errors are raised
    on every rank, by code that has agreed on it.
    """
    try:
        code = command() or 0
    except (UserError, TrainingFailure) as error:
        if os.environ.get("RANK", "0") == "0":
            logger.error("%s", error)
            page = page_for(str(error), name)
            if page is not None and sys.stderr.isatty():  # in a log an error is one line
                logger.error("see %s", page)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE
    except Stopped as stopped:
        return stopped.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except OSError as error:
        failed = None if error.filename else _output_failure(again="\n")
        if failed is not None:
            return failed
        if not is_full(error) and not is_refusal(error):
            raise
        remedy = "free some, or write elsewhere" if is_full(error) else "see to it, or to the file system"
        logger.error("%s: %s: %s", error.filename or "a file of this command", error.strerror, remedy)
        return EXIT_USER_ERROR
    return _output_failure() or code


def _output_failure(again: str = "") -> int | None:
    """Bring what is printed to its reader; the exit code where that fails.

    again: written first, since an output that has failed drops its text, and fails once more only with some.
    """
    try:
        sys.stdout.write(again)
        sys.stdout.flush()
        return None
    except BrokenPipeError:
        code = EXIT_BROKEN_PIPE
    except OSError as error:
        logger.error("the output cannot be written (%s): send it elsewhere", error.strerror)
        code = EXIT_FAILURE
    # the interpreter flushes once more when it ends, and would complain
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _print_any_character() -> None:
    """A terminal that has no such character shows its code."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and sys.stdout.errors == "strict":
        reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
