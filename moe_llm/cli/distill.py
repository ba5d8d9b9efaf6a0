"""`moe-llm teach`: its arguments, and what it prints. Loads nothing heavy by itself."""

import argparse
from dataclasses import fields


def add_teach_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("teacher", metavar="TEACHER", help="checkpoint directory of a causal language model")
    command.add_argument(
        "prompts", nargs="+", metavar="PROMPTS", help="files or globs: rows with messages or prompt, or texts"
    )
    command.add_argument("--out", required=True, metavar="FILE.jsonl", help="what is written; it must not exist")
    command.add_argument(
        "--continue",
        dest="continued",
        type=_above(int, 1),
        metavar="N",
        help="PROMPTS are texts: continue the first N tokens of each; without it they are chat",
    )
    command.add_argument("--max-new-tokens", type=_above(int, 1), default=256, metavar="N", help="of an answer")
    command.add_argument("--beams", type=_above(int, 1), default=5, metavar="N", help="of the search (default 5)")
    command.add_argument(
        "--temperature", type=_above(float, 0), metavar="T", help="draw answers instead, with --beams 1"
    )
    command.add_argument("--batch-size", type=_above(int, 1), default=8, metavar="N", help="prompts at once")
    command.add_argument("--limit", type=_above(int, 1), metavar="N", help="prompts in all")
    command.add_argument("--seed", type=_above(int, 0), default=0, metavar="N", help="of what is drawn")


def run_teach(args: argparse.Namespace) -> None:
    from moe_llm.distill.answers import AnswerOptions, write_answers

    options = AnswerOptions(**{field.name: getattr(args, field.name) for field in fields(AnswerOptions)})
    written = write_answers(args.teacher, args.prompts, args.out, options)
    print(f"{args.out}: {written.rows:,} answers, {written.left_out:,} prompts left out")


def _above(number: type, least: float):
    """A number from `least` upwards; above it, where that is 0 and the number is not whole."""

    def parse(text: str):
        try:
            value = number(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not least <= value < float("inf") or (number is float and value <= least):
            raise argparse.ArgumentTypeError(f"{text} is out of range: use a larger number")
        return value

    return parse
