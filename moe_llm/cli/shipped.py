"""The configurations that come with the package: `moe-llm quickstart`, `config list` and `config copy`."""

import argparse
import shutil
import sys
from pathlib import Path

from moe_llm.cli.parser import CommandParser
from moe_llm.errors import UserError
from moe_llm.progress import LIBRARIES, progress

# in a clone a link to configs/, in a wheel a folder
_FOLDER = Path(__file__).parents[1] / "shipped_configs"
_CLOSE = 0.6  # as of mistyped commands and options


def shipped() -> dict[str, Path]:
    """Files by name, such as routing/top_p.yaml."""
    return {path.relative_to(_FOLDER).as_posix(): path for path in sorted(_FOLDER.rglob("*.yaml"))}


def find(name: str) -> Path:
    """A shipped configuration, by its name with or without .yaml.

    Raises:
        UserError: there is none.
    """
    import difflib

    known = shipped()
    found = known.get(name) or known.get(f"{name}.yaml")
    if found is None:
        # by the last part of a name: a folder that is right says nothing for a file of it
        folder, _, stem = name.removesuffix(".yaml").rpartition("/")
        rivals: dict[str, list[str]] = {}
        for key in known:
            parent, _, own = key.removesuffix(".yaml").rpartition("/")
            if not folder or difflib.SequenceMatcher(None, folder, parent).ratio() >= _CLOSE:
                rivals.setdefault(own, []).append(key.removesuffix(".yaml"))
        near = difflib.get_close_matches(stem, rivals, n=1, cutoff=_CLOSE)
        hint = f"did you mean {rivals[near[0]][0]}?" if near else "moe-llm config list names those that are"
        raise UserError(f"no configuration {name!r} is shipped: {hint}")
    return found


def add_quickstart(parser: CommandParser) -> CommandParser:
    summary = "train a small model on Python's own source text, in minutes on a CPU"
    command = parser.add_command("quickstart", summary, "moe-llm quickstart run.dir=runs/quickstart", _quickstart)
    command.add_argument("overrides", metavar="section.key=value", nargs="*", default=[], help="override a value")
    return command


def _quickstart(args: argparse.Namespace) -> None:
    from moe_llm.api import load_config

    with progress(LIBRARIES):
        from moe_llm.train.run import train

    train(load_config(find("quickstart"), args.overrides))


def add_list_and_copy(config: CommandParser) -> None:
    """`config list` and `config copy`."""
    config.add_command("list", "name the configurations that come with the package", "moe-llm config list", _list)
    example = "moe-llm config copy routing/top_p top_p.yaml"
    copy = config.add_command("copy", "write one of them to a file, to change it", example, _copy)
    copy.add_argument("name", metavar="NAME", help="a name of config list, with or without .yaml")
    copy.add_argument(
        "out", metavar="FILE", nargs="?", help="the file to write (default: its name, in the working directory)"
    )


def _list(args: argparse.Namespace) -> None:
    print("\n".join(shipped()))


def _copy(args: argparse.Namespace) -> None:
    source = find(args.name)
    target = Path(args.out or source.name)
    if target.exists():
        raise UserError(f"{target} exists: name another FILE, or remove it")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): name another FILE") from error
    print(f"written: {target}", file=sys.stderr)
