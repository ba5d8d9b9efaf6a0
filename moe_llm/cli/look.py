"""Commands that show what a model does, or what a run has recorded."""

import argparse
import contextlib
import sys
from pathlib import Path

from moe_llm.cli.arguments import add_json, add_model, at_least, check_one_model, print_json, print_table, share
from moe_llm.cli.parser import CommandParser
from moe_llm.errors import UserError
from moe_llm.progress import LIBRARIES, progress


def add_generate(parser: CommandParser) -> CommandParser:
    example = "moe-llm generate runs/quickstart/checkpoints/latest --prompt 'def main'"
    command = parser.add_command("generate", "continue a text with a checkpoint", example, _generate)
    add_model(command)
    command.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated"
    )
    command.add_argument("--prompt-file", metavar="FILE", help="a file with one prompt per line")
    command.add_argument(
        "--chat", action="store_true", help="the prompt is a user's turn, by the chat template; prints the answer"
    )
    _add_sampling(command, 128)
    _add_quantize(command)
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text before which to stop; may be repeated"
    )
    command.add_argument(
        "--batch-size", type=at_least(int, 1), default=8, metavar="N", help="prompts at once (default 8)"
    )
    command.add_argument(
        "--no-cache", action="store_true", help="compute earlier tokens again: the same text, more slowly"
    )
    add_json(command)
    return command


def _add_sampling(command: CommandParser, length: int) -> None:
    command.add_argument(
        "--max-new-tokens", type=at_least(int, 1), default=length, metavar="N", help=f"most tokens (default {length})"
    )
    command.add_argument(
        "--temperature",
        type=at_least(float, 0),
        default=0.8,
        metavar="T",
        help="0: always the likeliest token (default 0.8)",
    )
    command.add_argument(
        "--top-p",
        type=share,
        default=0.95,
        metavar="P",
        help="sample from the likeliest tokens of total probability P (default 0.95)",
    )
    command.add_argument(
        "--seed", type=at_least(int, 0), default=0, metavar="N", help="seed of the sampling (default 0)"
    )


def _add_quantize(command: CommandParser) -> None:
    command.add_argument(
        "--quantize-experts", choices=("int8", "nf4"), help="hold a CHECKPOINT's experts in 8 or 4 bits"
    )


def _quantize(args: argparse.Namespace) -> dict[str, str]:
    if args.quantize_experts is not None and args.ensemble is not None:
        raise UserError("--quantize-experts takes one checkpoint, and --ensemble is given: name a CHECKPOINT")
    return {} if args.quantize_experts is None else {"quantize_experts": args.quantize_experts}


def _generate(args: argparse.Namespace) -> None:
    check_one_model(args)
    prompts = _prompts(args)
    options = {name: getattr(args, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
    if args.chat:
        options["chat"] = True
    options |= _quantize(args)
    if args.ensemble is not None:
        given = [f"--{name}" for name in ("stop", "no-cache") if getattr(args, name.replace("-", "_"))]
        if given:
            raise UserError(f"{given[0]} is for one checkpoint, and --ensemble is given: leave it out")
        with progress(LIBRARIES):
            from moe_llm.ensemble.run import generate_command

        texts = [generate_command(args.ensemble, prompt, **options) for prompt in prompts]
    else:
        with progress(LIBRARIES):
            from moe_llm.inference.generate import generate_texts

        options |= {"stop": args.stop, "batch_size": args.batch_size, "use_cache": not args.no_cache}
        texts = generate_texts(args.checkpoint, prompts, **options)
    if args.json:
        print_json([{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts)])
    else:
        print("\n---\n".join(texts))


def _prompts(args: argparse.Namespace) -> list[str]:
    """Those of the command line, and the lines of --prompt-file that are not empty."""
    prompts = list(args.prompt)
    if args.prompt_file is not None:
        try:
            lines = Path(args.prompt_file).read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--prompt-file {args.prompt_file} cannot be read ({error}): give a UTF-8 text file"
            ) from error
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise UserError("no prompt is given: use --prompt TEXT or --prompt-file FILE with a prompt a line")
    if "" in args.stop:
        raise UserError("--stop '' would stop at once: give a text")
    return prompts


def add_chat(parser: CommandParser) -> CommandParser:
    summary = "chat with a checkpoint, by its chat template"
    command = parser.add_command("chat", summary, "moe-llm chat runs/chat/checkpoints/latest", _chat)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint directory with a chat template")
    command.add_argument("--system", metavar="TEXT", help="a system turn before the first one")
    _add_sampling(command, 512)
    _add_quantize(command)
    command.add_argument(
        "--no-cache", action="store_true", help="compute earlier turns again: the same text, more slowly"
    )
    return command


def _chat(args: argparse.Namespace) -> None:
    with progress(LIBRARIES):
        import torch

        from moe_llm.inference.chat import HELP, Conversation, talk
        from moe_llm.inference.generate import load

    conversation = Conversation(
        load(args.checkpoint, quantize_experts=args.quantize_experts),
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        use_cache=not args.no_cache,
        temperature=args.temperature,
        top_p=args.top_p,
    )
    torch.manual_seed(args.seed)
    if sys.stdin.isatty():
        print(f"({HELP})", file=sys.stderr)
    with contextlib.suppress(KeyboardInterrupt):  # the user's way to leave
        talk(conversation, sys.stdin, lambda text: print(text, end="", flush=True))


def add_evaluate(parser: CommandParser) -> CommandParser:
    example = "moe-llm evaluate runs/quickstart/checkpoints/latest --data 'texts/*.txt'"
    command = parser.add_command("evaluate", "measure loss, perplexity and bits per byte on text", example, _evaluate)
    add_model(command)
    command.add_argument("--data", nargs="+", metavar="FILE_OR_GLOB", help="text, jsonl or parquet")
    command.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks of lm_eval, with or without --data")
    command.add_argument("--tasks-path", metavar="DIR", help="task files of your own")
    command.add_argument("--num-fewshot", type=at_least(int, 0), metavar="N", help="examples before each question")
    command.add_argument("--limit", type=at_least(int, 1), metavar="N", help="documents of each task")
    command.add_argument(
        "--batch-size", type=at_least(int, 1), default=8, metavar="N", help="blocks per batch (default 8)"
    )
    command.add_argument("--chat", action="store_true", help="the files hold chat: score the assistant's turns")
    _add_reading(command)
    command.add_argument("--max-blocks", type=at_least(int, 1), metavar="N", help="use only the first N blocks")
    _add_quantize(command)
    add_json(command)
    return command


def _evaluate(args: argparse.Namespace) -> None:
    check_one_model(args)
    if not args.data and not args.tasks:
        raise UserError("neither --data nor --tasks is given: name files or tasks to evaluate on")
    if args.tasks and args.ensemble is not None:
        raise UserError("--tasks takes one checkpoint, and --ensemble is given: name a CHECKPOINT")
    options = {"batch_size": args.batch_size, "max_blocks": args.max_blocks, "chat": args.chat}
    if args.text_field is not None:
        options["text_field"] = args.text_field
    if args.parse_special_tokens:
        options["parse_special_tokens"] = True
    if args.quantize_experts is not None and not args.data:
        raise UserError("--quantize-experts applies to --data, which is not given: name files")
    options |= _quantize(args)
    if args.ensemble is not None:
        with progress(LIBRARIES):
            from moe_llm.ensemble.evaluate import format_table
            from moe_llm.ensemble.run import evaluate_command

        table = evaluate_command(args.ensemble, args.data, **options)
        print_json(table) if args.json else print(format_table(table))
        return
    result: dict[str, float] = {}
    if args.data:
        with progress(LIBRARIES):
            from moe_llm.evaluation.evaluate import evaluate_files

        result |= evaluate_files(args.checkpoint, args.data, **options)
    if args.tasks:
        with progress(LIBRARIES):
            from moe_llm.evaluation.tasks import evaluate_tasks

        result |= evaluate_tasks(
            args.checkpoint,
            args.tasks,
            path=args.tasks_path,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            batch_size=args.batch_size,
            chat=args.chat,
        )
    if args.json:
        print_json(result)
    else:
        for name, value in result.items():
            print(f"{name:<16} {value:.6g}" if isinstance(value, float) else f"{name:<16} {value}")


def _add_reading(command: CommandParser) -> None:
    """How text is read from files."""
    command.add_argument(
        "--text-field", metavar="COLUMN", help="for files with rows: the column that holds the text (default text)"
    )
    command.add_argument(
        "--parse-special-tokens", action="store_true", help="read the text of special tokens as these tokens"
    )


def add_inspect(parser: CommandParser) -> CommandParser:
    example = "moe-llm inspect runs/quickstart/checkpoints/latest --data code.txt prose.txt --out inspected"
    command = parser.add_command("inspect", "show which tokens of a text go to which experts", example, _inspect)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint directory")
    command.add_argument(
        "--data", required=True, nargs="+", metavar="FILE_OR_GLOB", help="text, jsonl or parquet; each is one source"
    )
    _add_reading(command)
    command.add_argument("--max-tokens", type=at_least(int, 1), metavar="N", help="most tokens to read of each source")
    command.add_argument(
        "--removal-rows",
        type=at_least(int, 0),
        default=4,
        metavar="N",
        help="pieces of each source on which every expert is removed in turn (default 4; 0: not at all)",
    )
    command.add_argument("--seed", type=at_least(int, 0), default=0, metavar="N", help="seed of the permutations")
    add_json(command)
    command.add_argument("--out", metavar="DIR", help="write inspect.json, inspect.html and the plots there")
    return command


def _inspect(args: argparse.Namespace) -> None:
    from moe_llm.inspect.report import check_out, format_report, write_report

    if args.out:
        check_out(args.out)
    with progress(LIBRARIES):
        from moe_llm.inspect.inspect import Settings, inspect_checkpoint

    settings = Settings(
        max_tokens=args.max_tokens,
        removal_rows=args.removal_rows,
        seed=args.seed,
        text_field=args.text_field,
        parse_special_tokens=args.parse_special_tokens,
    )
    report = inspect_checkpoint(args.checkpoint, args.data, settings)
    if args.out:
        with progress("drawing"):
            page = write_report(report, args.out)
        print(f"written: {page}", file=sys.stderr)
    if args.json:
        print_json({key: value for key, value in report.items() if key != "shown"})
    else:
        print(format_report(report))


def add_diff(parser: CommandParser) -> CommandParser:
    summary = "show what has changed between two checkpoints of one model, by part"
    command = parser.add_command("diff", summary, "moe-llm diff BASE TUNED --layers", _diff)
    command.add_argument("base", metavar="BASE", help="a checkpoint directory")
    command.add_argument("tuned", metavar="TUNED", help="another checkpoint of the same shapes")
    command.add_argument("--layers", action="store_true", help="a row for each layer")
    command.add_argument("--experts", action="store_true", help="a row for each expert")
    add_json(command)
    return command


def _diff(args: argparse.Namespace) -> None:
    with progress(LIBRARIES):
        from moe_llm.finetune.diff import as_table, diff

    rows = diff(args.base, args.tuned, layers=args.layers, experts=args.experts)
    print_json(rows) if args.json else print_table(as_table(rows))


def add_report(parser: CommandParser) -> CommandParser:
    summary = "draw what runs have recorded, as one HTML page and as pictures"
    command = parser.add_command("report", summary, "moe-llm report runs/a runs/b --out compared.html", _report)
    command.add_argument("runs", metavar="RUN", nargs="+", help="a run directory; several are compared")
    command.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first RUN)")
    return command


def _report(args: argparse.Namespace) -> None:
    with progress(LIBRARIES):
        from moe_llm.report.report import report

    with progress("drawing"):
        page, *pictures = report(args.runs, args.out)
    print(f"{page}, and {len(pictures)} plots in {pictures[0].parent}")


def add_push(parser: CommandParser) -> CommandParser:
    summary = "upload a checkpoint to the Hugging Face hub, without trainer state"
    example = "moe-llm push runs/quickstart/checkpoints/latest OWNER/NAME"
    command = parser.add_command("push", summary, example, _push)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint directory, or one of an adapter")
    command.add_argument("repository", metavar="REPO", help="OWNER/NAME, which is created if it does not exist")
    command.add_argument("--private", action="store_true", help="make a new repository private")
    command.add_argument("--base", metavar="OWNER/NAME", help="of an adapter: the repository of its model")
    return command


def _push(args: argparse.Namespace) -> None:
    with progress(LIBRARIES):
        from moe_llm.hub import push

    print(push(args.checkpoint, args.repository, private=args.private, base=args.base))
