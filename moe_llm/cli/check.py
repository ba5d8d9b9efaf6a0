"""Commands that check a configuration before a run, or a checkpoint after it."""

import argparse
import signal
import sys
from contextlib import redirect_stdout

from moe_llm.cli.arguments import (
    add_configuration,
    add_json,
    at_least,
    load,
    positive,
    print_json,
    print_table,
    share,
    size_in_bytes,
)
from moe_llm.cli.parser import CommandParser
from moe_llm.cli.shipped import add_list_and_copy
from moe_llm.errors import UserError
from moe_llm.ops.accelerators import ACCELERATORS
from moe_llm.progress import LIBRARIES, progress


def add_config(parser: CommandParser) -> CommandParser:
    """`config schema`, `show`, `list` and `copy`."""
    example = "moe-llm config show configs/quickstart.yaml optim.lr=1e-3"
    config = parser.add_command(
        "config", "show a configuration as resolved, or the schema; list and copy those of the package", example
    )
    config.add_command(
        "schema",
        "print the JSON schema, for editors",
        "moe-llm config schema > schema.json",
        _config_schema,
        quick=True,
    )
    show = config.add_command(
        "show", "print the configuration with defaults and overrides", example, _config_show, quick=True
    )
    add_configuration(show)
    add_list_and_copy(config)
    return config


def _config_schema(args: argparse.Namespace) -> None:
    from moe_llm.config import Config

    print_json(Config.model_json_schema())


def _config_show(args: argparse.Namespace) -> None:
    from moe_llm.config import dump_config

    print(dump_config(load(args)), end="")


def add_params(parser: CommandParser) -> CommandParser:
    summary = "count total and active parameters by part, without allocating any"
    command = parser.add_command(
        "params", summary, "moe-llm params configs/mixtral_8x7b.yaml --parallel 8", _params, quick=True
    )
    add_configuration(command)
    add_json(command)
    command.add_argument(
        "--parallel", type=at_least(int, 1), metavar="RANKS", help="also show which rank holds which experts"
    )
    return command


def _params(args: argparse.Namespace) -> None:
    config = load(args)
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
        print_json(counts | ({"ranks": ranks} if ranks else {}))
        return
    print_table(params_table(total, active))
    if ranks:
        print_table(placement_table(ranks))


def add_plan(parser: CommandParser) -> CommandParser:
    summary = "compute memory and time of each layout on given GPUs, before a launch"
    example = "moe-llm plan configs/mixtral_8x7b.yaml --gpus 64 --gpu-memory 80GiB"
    command = parser.add_command("plan", summary, example, _plan, quick=True)
    add_configuration(command)
    count = at_least(int, 1)
    command.add_argument("--gpus", type=count, required=True, metavar="N", help="number of GPUs in total")
    command.add_argument(
        "--gpu-memory", type=size_in_bytes, required=True, metavar="SIZE", help="memory of one GPU, such as 80GiB"
    )
    command.add_argument(
        "--host-memory",
        type=size_in_bytes,
        metavar="SIZE",
        help="memory of one machine that offloaded optimizer tensors may take",
    )
    command.add_argument("--nodes", type=count, metavar="N", help="number of machines (default: one for each 8 GPUs)")
    command.add_argument(
        "--gpu", choices=tuple(ACCELERATORS), default="h100", help="the kind of GPU, for its speeds (default h100)"
    )
    command.add_argument(
        "--peak-tflops", type=positive, metavar="X", help="peak of dense bf16 products, instead of that kind's"
    )
    command.add_argument("--node-bandwidth", type=positive, metavar="GB/s", help="bandwidth of a GPU within its node")
    command.add_argument("--network-bandwidth", type=positive, metavar="GB/s", help="bandwidth of a GPU to other nodes")
    command.add_argument("--mfu", type=share, metavar="X", help="share of the peak that products reach")
    command.add_argument("--imbalance", type=positive, metavar="X", help="rows of the busiest rank over its even share")
    command.add_argument(
        "--loads",
        metavar="RUN",
        help="a run directory, whose last record's expert loads give the imbalance of each layout",
    )
    add_json(command)
    command.add_argument("--out", metavar="FILE.yaml", help="write the best layout as a configuration")
    return command


def _plan(args: argparse.Namespace) -> int:
    """1 where no layout fits."""
    config = load(args)
    from moe_llm.planner.hardware import MFU
    from moe_llm.planner.plan import IMBALANCE, Request, as_json, hardware_named, plan
    from moe_llm.planner.report import check_out, format_plan, write_config

    if args.imbalance is not None and args.imbalance < 1:
        raise UserError(f"--imbalance {args.imbalance:g} is below an even share: give 1 or more")
    if args.imbalance is not None and args.loads is not None:
        raise UserError("--imbalance and --loads both say how uneven rows are: give one of them")
    loads = None
    if args.loads is not None:
        from moe_llm.train.metrics import recorded_loads

        loads = recorded_loads(args.loads)
    if args.out:
        check_out(args.out)
    hardware = hardware_named(
        args.gpu,
        flops=_times(args.peak_tflops, 1e12),
        node_bandwidth=_times(args.node_bandwidth, 1e9),
        network_bandwidth=_times(args.network_bandwidth, 1e9),
    )
    found = plan(
        config,
        Request(
            gpus=args.gpus,
            nodes=args.nodes or -(-args.gpus // 8),
            memory=args.gpu_memory,
            hardware=hardware,
            mfu=args.mfu or MFU,
            imbalance=args.imbalance or IMBALANCE,
            host_memory=args.host_memory,
            loads=loads,
        ),
    )
    print_json(as_json(found)) if args.json else print(format_plan(found))
    if found.best is None:
        return 1
    if args.out:
        write_config(found, args.out)
        print(f"written: {args.out}", file=sys.stderr)
    return 0


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def add_doctor(parser: CommandParser) -> CommandParser:
    summary = "run a small copy of a run on local ranks and in one process, and compare them"
    command = parser.add_command("doctor", summary, "moe-llm doctor configs/quickstart.yaml --ranks 2", _doctor)
    add_configuration(command)
    command.add_argument("--ranks", type=at_least(int, 2), metavar="N", help="local processes (default 2)")
    command.add_argument(
        "--launch",
        action="store_true",
        help="inside accelerate launch or torchrun: examine its ranks, on their own devices",
    )
    command.add_argument("--steps", type=at_least(int, 2), default=4, metavar="N", help="optimizer steps (default 4)")
    add_json(command)
    return command


def _doctor(args: argparse.Namespace) -> int:
    """1 where it finds a fault."""
    config = load(args)
    with progress(LIBRARIES):
        from moe_llm.doctor.examine import examine, examine_launched
        from moe_llm.doctor.report import as_json, print_report

    def say(sentence: str) -> None:
        if not args.quiet:
            print(f"doctor: {sentence}", file=sys.stderr)

    # the default action would leave the ranks and the temporary directory behind
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if args.launch and args.ranks is not None:
        raise UserError(f"--ranks {args.ranks} contradicts --launch, whose ranks are the launcher's: leave one out")
    with progress("examining"):
        if args.launch:
            report = examine_launched(config, steps=args.steps, say=say)
        else:
            report = examine(config, ranks=args.ranks or 2, steps=args.steps, say=say)
    if report is None:  # not of rank 0
        return 0
    if args.json:
        print_json(as_json(report))
    else:
        print_report(report)
    return 0 if report.passed else 1


def add_bench(parser: CommandParser) -> CommandParser:
    summary = "time a few training steps of a configuration on this machine, by part"
    command = parser.add_command("bench", summary, "moe-llm bench configs/quickstart.yaml --steps 5", _bench)
    add_configuration(command)
    command.add_argument("--steps", type=at_least(int, 1), default=5, metavar="N", help="timed steps (default 5)")
    command.add_argument("--trace", metavar="FILE", help="write a trace of one step, for chrome://tracing or Perfetto")
    add_json(command)
    return command


def _bench(args: argparse.Namespace) -> None:
    config = load(args)
    with redirect_stdout(sys.stderr):  # libraries print and log to stdout, which is for the report alone
        with progress(LIBRARIES):
            from moe_llm.bench.run import bench, format_report

        with progress("timing"):
            report = bench(config, steps=args.steps, trace=args.trace)
    if report is not None:  # of the main rank
        print_json(report) if args.json else print(format_report(report))


def add_verify(parser: CommandParser) -> CommandParser:
    summary = "compare a checkpoint's files with their hashes, and look for NaN in its tensors"
    command = parser.add_command("verify", summary, "moe-llm verify runs/quickstart/checkpoints/latest", _verify)
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint directory")
    add_json(command)
    return command


def _verify(args: argparse.Namespace) -> None:
    from dataclasses import asdict

    with progress(LIBRARIES):
        from moe_llm.checkpoint.verify import verify_checkpoint

    found = verify_checkpoint(args.checkpoint)
    if args.json:
        print_json(asdict(found))
        return
    files = f"{found.files} files have their hashes" if found.files else "there is no manifest to compare files with"
    print(f"{args.checkpoint}: {files}; {found.tensors:,} tensors ({found.nbytes:,} bytes) are finite")
