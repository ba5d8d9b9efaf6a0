"""Commands that train a model, or prepare its training."""

import argparse

from moe_llm.cli.arguments import add_configuration, at_least, load, positive, print_json, share_of, share_or_zero
from moe_llm.cli.parser import CommandParser
from moe_llm.progress import LIBRARIES, progress


def add_train(parser: CommandParser) -> CommandParser:
    summary = "train a model, or resume the run in its run directory"
    command = parser.add_command("train", summary, "moe-llm train configs/quickstart.yaml optim.lr=3e-4", _train)
    add_configuration(command)
    # the launcher `deepspeed` gives it, and so do older ones
    command.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    return command


def _train(args: argparse.Namespace) -> None:
    if args.quiet:
        args.overrides = ["logging.console=off", *args.overrides]
    config = load(args)
    from moe_llm.distributed.launcher import check_local_rank

    check_local_rank(args.local_rank)
    with progress(LIBRARIES):
        from moe_llm.train.run import train

    train(config)


def add_tokenizer(parser: CommandParser) -> CommandParser:
    summary = "train or fetch only the tokenizer"
    command = parser.add_command("tokenizer", summary, "moe-llm tokenizer configs/quickstart.yaml", _tokenizer)
    add_configuration(command)
    return command


def _tokenizer(args: argparse.Namespace) -> None:
    config = load(args)
    with progress(LIBRARIES):
        from moe_llm.cli.tokenizer import build_tokenizer_command

    print(build_tokenizer_command(config))


def add_prepare(parser: CommandParser) -> CommandParser:
    summary = "tokenise and check a run's text before training"
    command = parser.add_command("prepare", summary, "moe-llm prepare configs/quickstart.yaml", _prepare)
    add_configuration(command)
    command.add_argument("--json", action="store_true", help="print the manifest")
    command.add_argument(
        "--share", type=share_of, metavar="I/N", help="tokenise the shards of machine I of N alone, such as 2/4"
    )
    return command


def _prepare(args: argparse.Namespace) -> None:
    config = load(args)
    with progress(LIBRARIES):
        from moe_llm.data.prepare import format_manifest, format_share, prepare, prepare_share

    if args.share is not None:
        told = prepare_share(config, args.share)
        print_json(told) if args.json else print(format_share(told))
        return
    found = prepare(config)
    print_json(found) if args.json else print(format_manifest(found))


def add_upcycle(parser: CommandParser) -> CommandParser:
    summary = "turn a dense Mistral or Llama checkpoint into a Mixtral one"
    example = "moe-llm upcycle path/to/mistral out --num-local-experts 8"
    command = parser.add_command("upcycle", summary, example, _upcycle)
    command.add_argument("dense", metavar="DENSE_DIR", help="a checkpoint directory as transformers saves it")
    command.add_argument("out", metavar="OUT", help="the new checkpoint directory, which must not exist")
    count = at_least(int, 1)
    command.add_argument(
        "--num-local-experts", type=count, default=8, metavar="N", help="copies of each feed-forward layer (default 8)"
    )
    command.add_argument(
        "--num-experts-per-tok", type=count, default=2, metavar="K", help="copies that a token is sent to (default 2)"
    )
    command.add_argument(
        "--granularity", type=count, default=1, metavar="M", help="divide each copy into M experts (default 1)"
    )
    command.add_argument(
        "--noise",
        type=at_least(float, 0),
        default=0.0,
        metavar="S",
        help="add noise of S times a matrix's standard deviation",
    )
    command.add_argument(
        "--reinit", type=share_or_zero, default=0.0, metavar="R", help="initialise a share R of the hidden units again"
    )
    command.add_argument(
        "--seed", type=at_least(int, 0), default=0, metavar="N", help="seed of router, noise and reinitialised units"
    )
    return command


def _upcycle(args: argparse.Namespace) -> None:
    with progress(LIBRARIES):
        from moe_llm.finetune.upcycle import Recipe, upcycle

    recipe = Recipe(
        args.num_local_experts, args.num_experts_per_tok, args.noise, args.reinit, args.granularity, args.seed
    )
    model = upcycle(args.dense, args.out, recipe)
    print(
        f"{args.out}: {model.num_local_experts} experts, {model.num_experts_per_tok} a token, "
        f"{model.num_params():,} parameters, {model.num_params(active=True):,} active"
    )


def add_generate_dataset(parser: CommandParser) -> CommandParser:
    summary = "let a model answer prompts, to train another model on the answers"
    example = "moe-llm generate-dataset TEACHER prompts.jsonl --out answers.jsonl"
    command = parser.add_command("generate-dataset", summary, example, _generate_dataset)
    count = at_least(int, 1)
    command.add_argument("teacher", metavar="TEACHER", help="checkpoint directory of a causal language model")
    command.add_argument(
        "prompts", nargs="+", metavar="PROMPTS", help="files or globs: rows with messages or prompt, or texts"
    )
    command.add_argument("--out", required=True, metavar="FILE.jsonl", help="the file to write, which must not exist")
    command.add_argument(
        "--continue",
        dest="continued",
        type=count,
        metavar="N",
        help="PROMPTS are texts: continue the first N tokens of each; without it they are chat",
    )
    command.add_argument("--max-new-tokens", type=count, default=256, metavar="N", help="longest answer (default 256)")
    command.add_argument("--beams", type=count, default=5, metavar="N", help="beams of the search (default 5)")
    command.add_argument("--temperature", type=positive, metavar="T", help="sample answers instead, with --beams 1")
    command.add_argument("--batch-size", type=count, default=8, metavar="N", help="prompts at once (default 8)")
    command.add_argument("--limit", type=count, metavar="N", help="use only the first N prompts")
    command.add_argument("--seed", type=at_least(int, 0), default=0, metavar="N", help="seed of the sampling")
    command.add_argument(
        "--drafts",
        type=count,
        metavar="N",
        help="PROMPTS have answers: write N of TEACHER's as drafts, each with the answer, for a model that rewrites them",
    )
    command.add_argument(
        "--template", metavar="TEXT", help="for drafts: the text that that model reads, with {input} and {output}"
    )
    command.add_argument(
        "--reward",
        metavar="overlap|CHECKPOINT",
        help="score of drafts: the words shared with the answer, or a checkpoint's probability of the answer after the draft",
    )
    command.add_argument(
        "--pairs-out", metavar="FILE.jsonl", help="with --reward: each prompt's best and worst draft, as preferences"
    )
    return command


def _generate_dataset(args: argparse.Namespace) -> None:
    from dataclasses import fields

    with progress(LIBRARIES):
        from moe_llm.distill.answers import AnswerOptions, write_answers

    options = AnswerOptions(**{field.name: getattr(args, field.name) for field in fields(AnswerOptions)})
    if args.pairs_out is not None:
        with progress(LIBRARIES):
            from moe_llm.distill.drafts import check_pairs

        check_pairs(args.pairs_out, options.reward, options.drafts)
    written = write_answers(args.teacher, args.prompts, args.out, options)
    if args.pairs_out is not None:
        with progress(LIBRARIES):
            from moe_llm.distill.drafts import write_pairs

        print(f"{args.pairs_out}: {write_pairs(args.out, args.pairs_out):,} pairs of drafts")
    print(f"{args.out}: {written.rows:,} answers, {written.left_out:,} prompts left out")
