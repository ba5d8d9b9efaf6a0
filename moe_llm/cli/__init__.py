"""`moe-llm ...`: parse, then one call.

Nothing heavy is imported up here: `moe-llm --help` answers before torch would have begun to load, and a
mistake in a configuration is told before the code that would have used it is imported.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from moe_llm.cli.distill import add_teach_arguments, run_teach
from moe_llm.cli.ensemble import add_ensemble, add_model_arguments, check_one_model, run_evaluate
from moe_llm.cli.planner import add_inspect_arguments, add_plan_arguments, run_inspect, run_plan
from moe_llm.errors import Stopped, TrainingFailure, UserError
from moe_llm.threads import wait_briefly

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit code: 0, 1 where doctor finds a fault or training cannot go on, 2 for a
    user's mistake, 130 for Ctrl-C and 143 for SIGTERM, once a run is saved."""
    wait_briefly()  # before any command loads torch
    args = _parse(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: args.handler(args))


def run_command(command: Callable[[], int | None]) -> int:
    """Call `command`, which may return an exit code, and turn a `UserError` into one line on stderr and exit code 2,
    a `TrainingFailure` likewise into 1, Ctrl-C into 130.

    With several ranks each of them exits with the code, and rank 0 alone prints: these errors are raised
    on every rank, by code that has agreed on it.
    """
    try:
        return command() or 0
    except (UserError, TrainingFailure) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"moe-llm: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILURE
    except Stopped as stopped:
        return stopped.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse gives up on positionals at the first option: `params CONFIG --json a.b=1` leaves a.b=1 over
    if any(item.startswith("-") for item in rest) or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "moe-llm",
        description="Train Mixtral-style mixture-of-experts language models.",
        epilog="Overrides are section.key=value, the value in YAML: optim.lr=3e-4 data.sources.0.path=x.txt",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = _add(commands, "train", _train, "train, or go on with what the run directory holds")
    tokenizer = _add(commands, "tokenizer", _tokenizer, "train or fetch the tokenizer only")
    prepare = _add(commands, "prepare", _prepare, "tokenise and check all of a run's text before it is trained on")
    prepare.add_argument("--json", action="store_true", help="print the manifest")
    _add_generate(commands)
    _add_evaluate(commands)
    _add_upcycle(commands)
    _add_merge(commands)
    add_teach_arguments(_add(commands, "teach", run_teach, "let a model answer prompts, as text for another to learn"))
    add_ensemble(commands, _add, _at_least(int, 1))
    params = _add(commands, "params", _params, "total and active parameters by part, without allocating any")
    params.add_argument("--json", action="store_true", help="print JSON")
    params.add_argument(
        "--parallel", type=_at_least(int, 1), metavar="RANKS", help="also show which rank holds which experts"
    )

    doctor = _add(commands, "doctor", _doctor, "run a small copy on local ranks and in one process, and compare")
    doctor.add_argument("--ranks", type=_at_least(int, 2), default=2, metavar="N", help="local processes (default 2)")
    doctor.add_argument("--steps", type=_at_least(int, 2), default=4, metavar="N", help="optimizer steps (default 4)")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    bench = _add_bench(commands)
    plan = _add(commands, "plan", _plan, "memory and time of each layout on given GPUs, by arithmetic, before a launch")
    add_plan_arguments(plan)
    add_inspect_arguments(_add(commands, "inspect", run_inspect, "which tokens of a text go to which experts"))
    _add_diff(commands)
    _add_report(commands)

    config = commands.add_parser("config", help="the configuration's schema, or one as resolved")
    config_commands = config.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add(config_commands, "schema", _config_schema, "print the JSON schema, for editors")
    show = _add(config_commands, "show", _config_show, "print the configuration with defaults and overrides")
    for command in (train, tokenizer, prepare, params, doctor, bench, plan, show):
        command.add_argument("config", metavar="CONFIG", help="a YAML file")
        command.add_argument("overrides", metavar="section.key=value", nargs="*", default=[], help="override a value")
    return parser


def _add(commands, name: str, handler: Callable, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    command.set_defaults(handler=handler)
    return command


def _add_bench(commands) -> argparse.ArgumentParser:
    summary = "time a few training steps of a configuration on this machine, by part"
    command = _add(commands, "bench", _bench, summary)
    command.add_argument("--steps", type=_at_least(int, 1), default=5, metavar="N", help="timed steps (default 5)")
    command.add_argument("--trace", metavar="FILE", help="write a trace of one step, for chrome://tracing or Perfetto")
    command.add_argument("--json", action="store_true", help="print JSON")
    return command


def _add_generate(commands) -> None:
    command = _add(commands, "generate", _generate, "continue a text with a checkpoint")
    add_model_arguments(command)
    command.add_argument("--prompt", required=True, help="the text to continue")
    command.add_argument("--max-new-tokens", type=_at_least(int, 1), default=128, metavar="N", help="at most")
    command.add_argument(
        "--temperature", type=_at_least(float, 0), default=0.8, metavar="T", help="0: the likeliest token"
    )
    command.add_argument(
        "--top-p", type=_share, default=0.95, metavar="P", help="sample from the likeliest tokens of mass P"
    )
    command.add_argument("--seed", type=_at_least(int, 0), default=0, metavar="N", help="of the sampling")


def _add_evaluate(commands) -> None:
    command = _add(commands, "evaluate", _evaluate, "loss, perplexity and bits per byte on text")
    add_model_arguments(command)
    command.add_argument("--data", required=True, nargs="+", metavar="FILE_OR_GLOB", help="text, jsonl or parquet")
    command.add_argument("--batch-size", type=_at_least(int, 1), default=8, metavar="N", help="blocks a batch")
    command.add_argument("--chat", action="store_true", help="the files hold chat: score the assistant's turns")
    command.add_argument("--max-blocks", type=_at_least(int, 1), metavar="N", help="blocks in all")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_upcycle(commands) -> None:
    command = _add(commands, "upcycle", _upcycle, "make a Mixtral checkpoint of a dense Mistral or Llama one")
    command.add_argument("dense", metavar="DENSE_DIR", help="a checkpoint directory as transformers saves it")
    command.add_argument("out", metavar="OUT", help="the new checkpoint directory, which must not exist")
    count, share = _at_least(int, 1), _at_least(float, 0)
    command.add_argument("--num-local-experts", type=count, default=8, metavar="N", help="copies of each feed-forward")
    command.add_argument("--num-experts-per-tok", type=count, default=2, metavar="K", help="copies a token takes")
    command.add_argument("--granularity", type=count, default=1, metavar="M", help="cut each copy into M experts")
    command.add_argument("--noise", type=share, default=0.0, metavar="S", help="noise, a share of a matrix's deviation")
    command.add_argument("--reinit", type=_fraction, default=0.0, metavar="R", help="share of units drawn anew")
    command.add_argument("--seed", type=_at_least(int, 0), default=0, metavar="N", help="of router, noise and reinit")


def _add_diff(commands) -> None:
    command = _add(commands, "diff", _diff, "what has changed between two checkpoints of one model, by part")
    command.add_argument("base", metavar="BASE", help="a checkpoint directory")
    command.add_argument("tuned", metavar="TUNED", help="another, of the same shapes")
    command.add_argument("--layers", action="store_true", help="a row for each layer")
    command.add_argument("--experts", action="store_true", help="a row for each expert")
    command.add_argument("--json", action="store_true", help="print JSON")


def _add_report(commands) -> None:
    command = _add(commands, "report", _report, "what runs have recorded, as one HTML page and as pictures")
    command.add_argument("runs", metavar="RUN", nargs="+", help="a run directory; several are compared")
    command.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first RUN)")


def _add_merge(commands) -> None:
    command = _add(commands, "merge", _merge, "several models into one, by a recipe in mergekit's vocabulary")
    command.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    command.add_argument("out", metavar="OUT", help="the checkpoint directory to write")
    command.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file of weights (default 5GB)")


class _Version(argparse.Action):
    """Looks the version up when it is asked for."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs=0, help="print the version")

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        print(f"moe-llm {version('moe_llm')}")
        parser.exit()


def _at_least(number: type, bound: float) -> Callable[[str], float]:
    def parse(text: str):
        value = _number(number, text)
        if not bound <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is out of range: use a number from {bound} upwards")
        return value

    return parse


def _share(text: str) -> float:
    value = _number(float, text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range: use a number above 0 and at most 1")
    return value


def _fraction(text: str) -> float:
    return _share(text) if _number(float, text) else 0.0


def _number(number: type, text: str):
    try:
        return number(text)
    except ValueError:
        kind = "a whole number" if number is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind}") from None


def _train(args) -> None:
    config = _load(args)
    from moe_llm.train.run import train

    train(config)


def _bench(args) -> None:
    config = _load(args)
    from moe_llm.bench.run import bench, format_report

    report = bench(config, steps=args.steps, trace=args.trace)
    if report is not None:  # of the main rank
        _print_json(report) if args.json else print(format_report(report))


def _plan(args) -> int:
    return run_plan(args, _load(args))


def _tokenizer(args) -> None:
    config = _load(args)
    from moe_llm.cli.tokenizer import build_tokenizer_command

    print(build_tokenizer_command(config))


def _prepare(args) -> None:
    config = _load(args)
    from moe_llm.data.prepare import format_manifest, prepare

    found = prepare(config)
    _print_json(found) if args.json else print(format_manifest(found))


def _generate(args) -> None:
    check_one_model(args)
    if args.ensemble is None:
        from moe_llm.inference.generate import generate
    else:
        from moe_llm.ensemble.run import generate_command as generate

    text = generate(
        args.ensemble or args.checkpoint,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    print(text)


def _diff(args) -> None:
    from moe_llm.finetune.diff import as_table, diff

    rows = diff(args.base, args.tuned, layers=args.layers, experts=args.experts)
    _print_json(rows) if args.json else _print_table(as_table(rows))


def _report(args) -> None:
    from moe_llm.report.report import report

    page, *pictures = report(args.runs, args.out)
    print(f"{page}, and {len(pictures)} plots in {pictures[0].parent}")


def _evaluate(args) -> None:
    check_one_model(args)
    if args.ensemble is not None:
        run_evaluate(args)
        return
    from moe_llm.evaluation.evaluate import evaluate_files

    result = evaluate_files(
        args.checkpoint, args.data, batch_size=args.batch_size, max_blocks=args.max_blocks, chat=args.chat
    )
    if args.json:
        _print_json(result)
    else:
        for name, value in result.items():
            print(f"{name:<16} {value:.6g}" if isinstance(value, float) else f"{name:<16} {value}")


def _upcycle(args) -> None:
    from moe_llm.finetune.upcycle import Recipe, upcycle

    recipe = Recipe(
        args.num_local_experts, args.num_experts_per_tok, args.noise, args.reinit, args.granularity, args.seed
    )
    model = upcycle(args.dense, args.out, recipe)
    print(
        f"{args.out}: {model.num_local_experts} experts, {model.num_experts_per_tok} a token, "
        f"{model.num_params():,} parameters, {model.num_params(active=True):,} active"
    )


def _merge(args) -> None:
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


def _params(args) -> None:
    config = _load(args)
    if config.model.vocab_size is None:
        raise UserError(
            "model.vocab_size=null leaves the embeddings' size open: "
            "add model.vocab_size=N, the number of the tokenizer's entries"
        )
    from moe_llm.config.sizes import params_table, placement, placement_table

    total, active = config.model.parameter_counts(), config.model.parameter_counts(active=True)
    ranks = placement(config, args.parallel) if args.parallel else []
    if args.json:
        parts = {part: {"total": total[part], "active": active[part]} for part in total}
        counts = {"total": sum(total.values()), "active": sum(active.values()), "parts": parts}
        _print_json(counts | ({"ranks": ranks} if ranks else {}))
        return
    _print_table(params_table(total, active))
    if ranks:
        _print_table(placement_table(ranks))


def _print_table(table) -> None:
    from rich.console import Console

    # a pipe has no width of its own, and a number cut in the middle is worse than a long line
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _doctor(args) -> int:
    config = _load(args)
    from moe_llm.doctor.examine import examine
    from moe_llm.doctor.report import as_json, print_report

    def say(sentence: str) -> None:
        print(f"doctor: {sentence}", file=sys.stderr)

    # the default action would leave the ranks and the temporary directory behind
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    report = examine(config, ranks=args.ranks, steps=args.steps, say=say)
    if args.json:
        _print_json(as_json(report))
    else:
        print_report(report)
    return 0 if report.passed else EXIT_FAILURE


def _config_schema(args) -> None:
    from moe_llm.config import Config

    _print_json(Config.model_json_schema())


def _config_show(args) -> None:
    from moe_llm.config import dump_config

    print(dump_config(_load(args)), end="")


def _load(args):
    from moe_llm.api import load_config

    return load_config(args.config, args.overrides)


def _print_json(value) -> None:
    import json

    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    sys.exit(main())
