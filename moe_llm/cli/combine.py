"""Commands that make one model, or one answer, of several models."""

import argparse

from moe_llm.cli.arguments import at_least
from moe_llm.cli.parser import CommandParser
from moe_llm.progress import LIBRARIES, progress


def add_merge(parser: CommandParser) -> CommandParser:
    summary = "merge several models into one, by a recipe in mergekit's vocabulary"
    command = parser.add_command("merge", summary, "moe-llm merge recipe.yaml merged", _merge)
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    command.add_argument("out", metavar="OUT", help="the checkpoint directory to write")
    command.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest file of weights (default 5GB)"
    )
    return command


def _merge(args: argparse.Namespace) -> None:
    with progress(LIBRARIES):
        from moe_llm.merge.recipe import SoupRecipe, load_recipe

    recipe = load_recipe(args.recipe)
    if isinstance(recipe, SoupRecipe):
        with progress(LIBRARIES):
            from moe_llm.merge.soup import format_decisions, greedy_soup

        print(format_decisions(greedy_soup(recipe, args.out, args.max_shard_size)))
    elif recipe.recalibrate is not None:
        with progress(LIBRARIES):
            from moe_llm.merge.recalibrate import merge_recalibrated

        merge_recalibrated(recipe, args.out, args.max_shard_size)
    else:
        with progress(LIBRARIES):
            from moe_llm.merge.run import merge

        merge(args.recipe, args.out, args.max_shard_size)
    print(f"written: {args.out}")


def add_extract_lora(parser: CommandParser) -> CommandParser:
    summary = "write the difference between a fine-tune and its base as a low-rank adapter for PEFT"
    example = "moe-llm extract-lora models/base models/tuned adapter --rank 32"
    command = parser.add_command("extract-lora", summary, example, _extract_lora)
    command.add_argument("base", metavar="BASE", help="a checkpoint directory")
    command.add_argument("tuned", metavar="TUNED", help="a fine-tune of it")
    command.add_argument("out", metavar="OUT", help="the adapter directory to write")
    command.add_argument(
        "--rank", type=at_least(int, 1), default=128, metavar="N", help="rank of each matrix (default 128)"
    )
    command.add_argument(
        "--sv-epsilon", type=at_least(float, 0), default=0.0, metavar="X", help="leave out singular values up to this"
    )
    for option, verb in (("--include", "take only"), ("--exclude", "leave out")):
        command.add_argument(
            option, action="append", default=[], metavar="REGEX", help=f"{verb} tensors whose name it finds; repeatable"
        )
    return command


def _extract_lora(args: argparse.Namespace) -> None:
    with progress(LIBRARIES):
        from moe_llm.merge.extract_lora import extract_lora

    names = ("rank", "sv_epsilon", "include", "exclude")
    left_out = extract_lora(args.base, args.tuned, args.out, **{name: getattr(args, name) for name in names})
    if left_out:
        worst = max(left_out, key=left_out.__getitem__)
        print(f"share of the difference that is left out: at most {left_out[worst]:.3f} ({worst})")
    print(f"written: {args.out}")


def add_export_adapter(parser: CommandParser) -> CommandParser:
    summary = "write the adapter of a run with finetune.lora, for PEFT"
    example = "moe-llm export-adapter runs/lora/checkpoints/latest adapter"
    command = parser.add_command("export-adapter", summary, example, _export_adapter)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint as training wrote it")
    command.add_argument("out", metavar="OUT", help="the adapter directory to write")
    return command


def _export_adapter(args: argparse.Namespace) -> None:
    with progress(LIBRARIES):
        from moe_llm.finetune.export_adapter import export_adapter

    print(f"written: {args.out} ({export_adapter(args.checkpoint, args.out)} weights adapted)")


def add_ensemble(parser: CommandParser) -> CommandParser:
    """`ensemble fit`."""
    example = "moe-llm ensemble fit ensemble.yaml fitted.yaml --data validation.txt"
    ensemble = parser.add_command("ensemble", "fit the weights of several models that answer together", example)
    command = ensemble.add_command("fit", "fit weights, lambda or threshold of an ensemble on text", example, _fit)
    command.add_argument("file", metavar="FILE", help="the ensemble's YAML file")
    command.add_argument("out", metavar="OUT", help="the same file with the fitted numbers, which must not exist")
    command.add_argument("--data", required=True, nargs="+", metavar="FILE_OR_GLOB", help="text, jsonl or parquet")
    command.add_argument(
        "--batch-size", type=at_least(int, 1), default=8, metavar="N", help="blocks per batch (default 8)"
    )
    command.add_argument(
        "--max-blocks",
        type=at_least(int, 1),
        metavar="N",
        help="use only the first N blocks, or documents for requests",
    )
    return ensemble


def _fit(args: argparse.Namespace) -> None:
    with progress(LIBRARIES):
        from moe_llm.ensemble.run import fit_command

    print(fit_command(args.file, args.out, args.data, max_blocks=args.max_blocks, batch_size=args.batch_size))
