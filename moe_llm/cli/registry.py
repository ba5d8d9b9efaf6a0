"""All commands, by group."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from moe_llm.cli import check, combine, look, shell, shipped, train
from moe_llm.cli.parser import CommandParser

GROUPS: dict[str, tuple[Callable[[CommandParser], CommandParser], ...]] = {
    "train a model": (
        shipped.add_quickstart,
        train.add_train,
        train.add_tokenizer,
        train.add_prepare,
        train.add_upcycle,
        train.add_generate_dataset,
    ),
    "look at a model": (
        look.add_generate,
        look.add_chat,
        look.add_evaluate,
        look.add_inspect,
        look.add_diff,
        look.add_report,
        look.add_push,
    ),
    "combine models": (
        combine.add_merge,
        combine.add_extract_lora,
        combine.add_export_adapter,
        combine.add_ensemble,
    ),
    "check before a run, or a checkpoint": (
        check.add_config,
        check.add_params,
        check.add_plan,
        check.add_doctor,
        check.add_bench,
        check.add_verify,
    ),
    "set up the shell": (shell.add_completion,),
}
RENAMED_COMMANDS = {"teach": "generate-dataset"}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command line, with the command's `handler`.

    Raises:
        SystemExit: 0 after help or the version; 2, and a line on stderr, for arguments that are wrong.
    """
    words = list(argv)
    if words and words[0] in RENAMED_COMMANDS:
        new = RENAMED_COMMANDS[words[0]]
        print(f"moe-llm: warning: {words[0]} has been renamed: write {new}", file=sys.stderr)
        words[0] = new
    parser = build_parser()
    parser.check_words(words)
    args, rest = parser.parse_known_args(words)
    # argparse gives up on positionals at the first option: `params CONFIG --json a.b=1` leaves a.b=1 over
    if any(item.startswith("-") for item in rest) or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def build_parser() -> CommandParser:
    """The parser of the whole command line, with help by group."""
    parser = CommandParser(
        "moe-llm",
        description="Train Mixtral-style mixture-of-experts language models.",
        usage="moe-llm [-h] [--version] COMMAND ...",
    )
    parser.add_argument("--version", action=_Version)
    groups = []
    for title, functions in GROUPS.items():
        before = len(parser.commands)
        for add in functions:
            add(parser)
        groups.append((title, list(parser.commands)[before:]))
    parser.describe_groups(
        groups,
        "moe-llm COMMAND --help shows a command's options.\n"
        "Overrides are section.key=value, the value in YAML: optim.lr=3e-4 data.sources.0.path=x.txt",
    )
    return parser


class _Version(argparse.Action):
    """Looks the version up when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any):
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"moe-llm {version('moe_llm')}")
        parser.exit()
