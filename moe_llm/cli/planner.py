"""`moe-llm plan` and `moe-llm inspect`: their arguments, and what they print. Loads nothing heavy by itself."""

import argparse
import json
import re
import sys

_SIZES = {"B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def add_plan_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--gpus", type=_positive(int), required=True, metavar="N", help="GPUs in all")
    command.add_argument("--gpu-memory", type=_bytes, required=True, metavar="SIZE", help="of one GPU, such as 80GiB")
    command.add_argument(
        "--host-memory", type=_bytes, metavar="SIZE", help="of one machine, which offloaded optimizer tensors may take"
    )
    command.add_argument("--nodes", type=_positive(int), metavar="N", help="machines (default: 8 GPUs on each)")
    command.add_argument(
        "--gpu", choices=("a100", "h100", "h200", "b200", "mi300x"), default="h100", help="its speeds (default h100)"
    )
    command.add_argument("--peak-tflops", type=_positive(float), metavar="X", help="dense bf16, in place of the GPU's")
    command.add_argument(
        "--node-bandwidth", type=_positive(float), metavar="GB/s", help="that a GPU sends within its node"
    )
    command.add_argument("--network-bandwidth", type=_positive(float), metavar="GB/s", help="and to other nodes")
    command.add_argument("--mfu", type=_positive(float, 1), metavar="X", help="share of the peak that products reach")
    command.add_argument(
        "--imbalance", type=_positive(float), metavar="X", help="rows of the busiest rank over its even share"
    )
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--out", metavar="FILE.yaml", help="write the best layout as a configuration")


def run_plan(args: argparse.Namespace, config) -> int:
    """1 where no layout fits."""
    from moe_llm.errors import UserError
    from moe_llm.planner.hardware import MFU
    from moe_llm.planner.plan import IMBALANCE, Request, as_json, hardware_named, plan
    from moe_llm.planner.report import check_out, format_plan, write_config

    if args.imbalance is not None and args.imbalance < 1:
        raise UserError(f"--imbalance {args.imbalance:g} is below an even share: give 1 or more")
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
        ),
    )
    print(json.dumps(as_json(found), indent=2) if args.json else format_plan(found))
    if found.best is None:
        return 1
    if args.out:
        write_config(found, args.out)
        print(f"written: {args.out}", file=sys.stderr)
    return 0


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def _positive(number: type, most: float = float("inf")):
    def parse(text: str):
        try:
            value = number(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not 0 < value <= most or value == float("inf"):
            bound = "" if most == float("inf") else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: use a number above 0{bound}")
        return value

    return parse


def _bytes(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if found is None or found[2].upper() not in _SIZES or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size with a unit: write it like 80GiB or 80GB")
    return float(found[1]) * _SIZES[found[2].upper()]


def add_inspect_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint directory")
    command.add_argument(
        "--data", required=True, nargs="+", metavar="FILE_OR_GLOB", help="text, jsonl or parquet; each is one source"
    )
    command.add_argument("--max-tokens", type=_positive(int), metavar="N", help="read of each source at most")
    command.add_argument(
        "--removal-rows",
        type=_from_zero,
        default=4,
        metavar="N",
        help="pieces of each source on which every expert is removed in turn (default 4; 0: not at all)",
    )
    command.add_argument("--seed", type=_from_zero, default=0, metavar="N", help="of the permutations")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--out", metavar="DIR", help="write inspect.json, inspect.html and the plots there")


def run_inspect(args: argparse.Namespace) -> None:
    from moe_llm.inspect.report import check_out, format_report, write_report

    if args.out:
        check_out(args.out)
    from moe_llm.inspect.inspect import Settings, inspect_checkpoint

    report = inspect_checkpoint(
        args.checkpoint, args.data, Settings(max_tokens=args.max_tokens, removal_rows=args.removal_rows, seed=args.seed)
    )
    if args.out:
        print(f"written: {write_report(report, args.out)}", file=sys.stderr)
    if args.json:
        print(json.dumps({key: value for key, value in report.items() if key != "shown"}, indent=2))
    else:
        print(format_report(report))


def _from_zero(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 upwards")
    return int(text)
