"""Kinds of arguments and of output that several commands share. Loads nothing heavy by itself."""

import argparse
import math
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moe_llm.errors import UserError

if TYPE_CHECKING:
    from moe_llm.config import Config

_SIZES = {"B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


# Arguments


def add_configuration(command: argparse.ArgumentParser) -> None:
    """CONFIG and overrides, which `load` reads."""
    command.add_argument("config", metavar="CONFIG", help="a YAML file")
    command.add_argument("overrides", metavar="section.key=value", nargs="*", default=[], help="override a value")


def add_model(command: argparse.ArgumentParser) -> None:
    """CHECKPOINT, or several models in its place."""
    command.add_argument("checkpoint", metavar="CHECKPOINT", nargs="?", help="a checkpoint directory")
    command.add_argument(
        "--ensemble", metavar="FILE", help="instead of CHECKPOINT: a YAML file that names several models"
    )


def add_json(command: argparse.ArgumentParser) -> None:
    """--json, for `print_json`."""
    command.add_argument("--json", action="store_true", help="print JSON")


def check_one_model(args: argparse.Namespace) -> None:
    """Refuse a command with both a checkpoint and an ensemble, or with neither."""
    if (args.checkpoint is None) == (args.ensemble is None):
        given = "neither CHECKPOINT nor" if args.ensemble is None else "both CHECKPOINT and"
        raise UserError(f"{given} --ensemble FILE is given: give one of them")


def load(args: argparse.Namespace) -> "Config":
    """The configuration that a command names, with its overrides."""
    from moe_llm.api import load_config

    return load_config(args.config, args.overrides)


# Numbers


def at_least(number: Callable[[str], Any], bound: float) -> Callable[[str], Any]:
    """Parses a finite number from `bound` upwards."""

    def parse(text: str) -> Any:
        value = _number(number, text)
        if not bound <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is out of range: use a number from {bound} upwards")
        return value

    return parse


def positive(text: str) -> float:
    """A finite number above 0."""
    value = _number(float, text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is out of range: use a number above 0")
    return value


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    value = _number(float, text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range: use a number above 0 and at most 1")
    return value


def share_or_zero(text: str) -> float:
    """A number from 0 to 1."""
    return share(text) if _number(float, text) else 0.0


def share_of(text: str) -> tuple[int, int]:
    """ "2/4", the second of four, as (1, 4)."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write it like 2/4, the second of four")
    return int(found[1]) - 1, int(found[2])


def size_in_bytes(text: str) -> float:
    """Bytes of "80GiB" or "80GB"; the unit is not optional."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    if found is None or found[2].upper() not in _SIZES or float(found[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size with a unit: write it like 80GiB or 80GB")
    return float(found[1]) * _SIZES[found[2].upper()]


def _number(number: Callable[[str], Any], text: str) -> Any:
    try:
        return number(text)
    except ValueError:
        kind = "a whole number" if number is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind}") from None


# Output


def print_json(value: Any) -> None:
    """Print JSON as every reader knows it: what is no finite number becomes null."""
    import json

    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_table(table: Any) -> None:
    """Print a table of rich."""
    from rich.console import Console

    # a pipe has no width of its own, and a number cut in the middle is worse than a long line
    Console(width=None if sys.stdout.isatty() else 120).print(table)
