"""Meta-train an initialisation that adapts fast; each of the configuration's data.sources is a task.

    python scripts/meta_train.py CONFIG --out runs/meta/init [--method reptile] [section.key=value ...]
    moe-llm train configs/finetune/experts_only.yaml model.init_from=runs/meta/init finetune.trainable=all ...

`optim` of the configuration is the optimizer of the adaptation to a task, at its full rate, and
`train.global_batch_size` the blocks of one of its steps; of `train`, `device` counts too, and all else does not. The
model is the configuration's, with random weights or those of `model.init_from`. Runs in one process, in fp32, and
writes a checkpoint at its end. A line a round tells the mean loss of its tasks at the first step of their adaptation
and after the last.
"""

import argparse
import sys

from moe_llm.cli import run_command
from moe_llm.config import load_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    parser.add_argument("--out", required=True, help="checkpoint directory to write")
    parser.add_argument("--method", choices=["reptile", "fomaml"], default="reptile")
    parser.add_argument("--rounds", type=_count, default=100)
    parser.add_argument("--inner-steps", type=_count, default=5, help="of the adaptation to a task")
    parser.add_argument("--tasks", type=_count, default=4, help="adapted to in a round")
    parser.add_argument(
        "--rate",
        type=_rate,
        help="reptile: share of the way to the adapted weights (default 0.5); fomaml: learning "
        "rate of Adam (default 1e-3)",
    )
    arguments, rest = parser.parse_known_args()
    if any(word.startswith("-") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides += rest
    return run_command(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    from moe_llm.finetune.init_from import complete
    from moe_llm.train.meta import MetaOptions, meta_train_sources

    config = load_config(arguments.config, arguments.overrides, complete)
    rate = arguments.rate or (0.5 if arguments.method == "reptile" else 1e-3)
    options = MetaOptions(arguments.method, arguments.rounds, arguments.inner_steps, arguments.tasks, rate)

    def say(done: int, before: float, after: float) -> None:
        print(f"round {done}/{options.rounds}: loss {before:.4f} -> {after:.4f}", file=sys.stderr, flush=True)

    meta_train_sources(config, arguments.out, options, say)
    print(f"checkpoint: {arguments.out}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number from 1 upwards")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is out of range: use a number above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
