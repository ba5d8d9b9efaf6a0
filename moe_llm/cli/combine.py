"""Commands that make one model, or one answer, of several models."""

import argparse

from moe_llm.cli.arguments import at_least
from moe_llm.cli.parser import CommandParser


def add_merge(parser: CommandParser) -> CommandParser:
    summary = "several models into one, by a recipe in mergekit's vocabulary"
    command = parser.add_command("merge", summary, "moe-llm merge configs/merge/slerp.yaml merged", _merge)
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    command.add_argument("out", metavar="OUT", help="the checkpoint directory to write")
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights (default 5GB)")
    return command


def _merge(args: argparse.Namespace) -> None:
    from moe_llm.merge.recipe import SoupRecipe, load_recipe

    recipe = load_recipe(args.recipe)
    if isinstance(recipe, SoupRecipe):
        from moe_llm.merge.soup import format_decisions, greedy_soup

        print(format_decisions(greedy_soup(recipe, args.out, args.max_shard_size)))
    elif recipe.recalibrate is not None:
        from moe_llm.merge.recalibrate import merge_recalibrated

        merge_recalibrated(recipe, args.out, args.max_shard_size)
    else:
        from moe_llm.merge.run import merge

        merge(args.recipe, args.out, args.max_shard_size)
    print(f"written: {args.out}")


def add_ensemble(parser: CommandParser) -> CommandParser:
    """`ensemble fit`."""
    example = "moe-llm ensemble fit ensemble.yaml fitted.yaml --data validation.txt"
    ensemble = parser.add_command("ensemble", "several models that answer together: fit their weights", example)
    command = ensemble.add_command("fit", "weights, lambda or threshold of an ensemble, from text", example, _fit)
    command.add_argument("file", metavar="FILE", help="the ensemble's YAML file")
    command.add_argument("out", metavar="OUT", help="the same with the numbers found; must not exist")
    command.add_argument("--data", required=True, nargs="+", metavar="FILE_OR_GLOB", help="text, jsonl or parquet")
    command.add_argument("--batch-size", type=at_least(int, 1), default=8, metavar="N", help="blocks a batch")
    command.add_argument(
        "--max-blocks", type=at_least(int, 1), metavar="N", help="blocks in all; documents for requests"
    )
    return ensemble


def _fit(args: argparse.Namespace) -> None:
    from moe_llm.ensemble.run import fit_command

    print(fit_command(args.file, args.out, args.data, max_blocks=args.max_blocks, batch_size=args.batch_size))
