"""A parser whose help shows commands by group, and which names the nearest word to a mistyped one."""

import argparse
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """The parser of `moe-llm`, of one command, or of a command that has commands of its own.

    commands: its own commands by name. options: its option words. summary, example: its lines in the list of commands.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self.commands: dict[str, CommandParser] = {}
        self.options: list[str] = []
        self.summary = ""
        self.example = ""
        self._places: Any = None
        defaults: dict[str, Any] = {
            "allow_abbrev": False,
            "formatter_class": argparse.RawDescriptionHelpFormatter,
        }
        super().__init__(*args, **(defaults | kwargs))

    def add_argument(self, *args: Any, **kwargs: Any) -> argparse.Action:
        self.options += [word for word in args if word.startswith("--")]
        return super().add_argument(*args, **kwargs)

    def add_command(
        self,
        name: str,
        summary: str,
        example: str,
        handler: Callable[[argparse.Namespace], int | None] | None = None,
        *,
        quick: bool = False,
    ) -> "CommandParser":
        """A command below this one.

        Args:
            summary: one line for the list of commands.
            example: a command line that shows its use.
            handler: called with the parsed arguments; its result is the exit code. None: it has commands below it.
            quick: it never takes long nor has notes, so that there is nothing for `--quiet` to leave out.
        """
        if self._places is None:
            self._places = self.add_subparsers(
                title="commands", required=True, metavar="COMMAND", prog=self.prog, parser_class=CommandParser
            )
        command = self._places.add_parser(name, description=summary, epilog=f"example: {example}")
        command.summary, command.example = summary, example
        if handler is not None:
            command.set_defaults(handler=handler)
            if not quick:
                command.add_argument(
                    "--quiet", action="store_true", help="no progress bars or notes; warnings, errors and results stay"
                )
        self.commands[name] = command
        return command

    def describe_groups(self, groups: Iterable[tuple[str, Sequence[str]]], end: str) -> None:
        """Put the commands into the help, by title of the group."""
        lines = []
        for title, names in groups:
            lines.append(f"{title}:")
            for name in names:
                lines += [f"  {name:<18}{self.commands[name].summary}", f"  {'':<18}  {self.commands[name].example}"]
            lines.append("")
        self.epilog = "\n".join([*lines, end])

    def check_words(self, words: Sequence[str]) -> None:
        """Refuse a command or an option that there is not, with the nearest name."""
        for place, word in enumerate(words):
            if word == "--":
                return
            option = word.partition("=")[0]
            if option.startswith("--") and option not in self.options:
                self._refuse(f"unrecognized arguments: {word}", option, self.options)
            if self.commands and not word.startswith("-"):
                if word not in self.commands:
                    known = ", ".join(self.commands)
                    self._refuse(
                        f"argument COMMAND: invalid choice: {word!r}", word, self.commands, f"the commands are {known}"
                    )
                self.commands[word].check_words(words[place + 1 :])
                return

    def _refuse(self, problem: str, word: str, known: Iterable[str], otherwise: str = "") -> NoReturn:
        near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else otherwise
        self.error(f"{problem}: {hint}" if hint else problem)
