"""The command that sets up the shell."""

import argparse
import functools
from typing import Any

from moe_llm.cli.parser import CommandParser

SHELLS = ("bash", "zsh", "tcsh", "fish")
# By the names that arguments have in the help: these are completed as paths.
_FILES = ("CONFIG", "RECIPE", "FILE", "FILE.yaml", "FILE.jsonl", "FILE_OR_GLOB", "PROMPTS")
_DIRECTORIES = ("CHECKPOINT", "DIR", "OUT", "RUN", "BASE", "TUNED", "DENSE_DIR", "TEACHER")


def add_completion(parser: CommandParser) -> CommandParser:
    summary = "print a script that completes commands, options and paths in a shell"
    handler = functools.partial(_completion, parser)
    command = parser.add_command(
        "completion", summary, "moe-llm completion bash > ~/.moe-llm.bash", handler, quick=True
    )
    command.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    return command


def _completion(parser: CommandParser, args: argparse.Namespace) -> None:
    import shtab

    _prepare(parser, shtab)
    print(shtab.complete(parser, shell=args.shell))


def _prepare(parser: CommandParser, shtab: Any) -> None:
    """Say which arguments are paths. Commands get the lines of argparse's own help, without which shtab takes them for
    hidden; ours are in the help by group."""
    for action in parser._actions:
        if action.metavar in _FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.metavar in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif isinstance(action, argparse._SubParsersAction):
            for name, command in parser.commands.items():
                action._choices_actions.append(action._ChoicesPseudoAction(name, (), command.summary))
    for command in parser.commands.values():
        _prepare(command, shtab)
