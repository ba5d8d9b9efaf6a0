"""`--ensemble FILE` of generate and evaluate, and `moe-llm ensemble fit`. Loads nothing heavy by itself."""

import argparse
import json
from collections.abc import Callable

from moe_llm.errors import UserError


def add_model_arguments(command: argparse.ArgumentParser) -> None:
    """CHECKPOINT, or several models in its place."""
    command.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="a checkpoint directory")
    command.add_argument("--ensemble", metavar="FILE", help="instead of CHECKPOINT: a YAML file that names several")


def check_one_model(args: argparse.Namespace) -> None:
    """Refuse a command with both a checkpoint and an ensemble, or with neither."""
    if (args.checkpoint is None) == (args.ensemble is None):
        given = "neither CHECKPOINT nor" if args.ensemble is None else "both CHECKPOINT and"
        raise UserError(f"{given} --ensemble FILE is given: give one of them")


def add_ensemble(commands, add: Callable, count: Callable) -> None:
    """`ensemble fit`. add: puts a command with handler and summary among others; count: parses numbers from 1 on."""
    ensemble = commands.add_parser("ensemble", help="several models that answer together: fit their weights")
    fit_commands = ensemble.add_subparsers(title="commands", required=True, metavar="COMMAND")
    command = add(fit_commands, "fit", run_fit, "weights, lambda or threshold of an ensemble, from text")
    command.add_argument("file", metavar="FILE", help="the ensemble's YAML file")
    command.add_argument("out", metavar="OUT", help="the same with the numbers found; must not exist")
    command.add_argument("--data", required=True, nargs="+", metavar="FILE_OR_GLOB", help="text, jsonl or parquet")
    command.add_argument("--batch-size", type=count, default=8, metavar="N", help="blocks a batch")
    command.add_argument("--max-blocks", type=count, metavar="N", help="blocks in all; documents for requests")


def run_fit(args: argparse.Namespace) -> None:
    from moe_llm.ensemble.run import fit_command

    print(fit_command(args.file, args.out, args.data, max_blocks=args.max_blocks, batch_size=args.batch_size))


def run_evaluate(args: argparse.Namespace) -> None:
    from moe_llm.ensemble.evaluate import format_table
    from moe_llm.ensemble.run import evaluate_command

    result = evaluate_command(
        args.ensemble, args.data, batch_size=args.batch_size, max_blocks=args.max_blocks, chat=args.chat
    )
    print(json.dumps(result, indent=2) if args.json else format_table(result))
