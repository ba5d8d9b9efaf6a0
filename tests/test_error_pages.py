"""On a terminal an error names the page of the documentation that helps."""

import contextlib
import io
from pathlib import Path

import pytest

from moe_llm import cli
from moe_llm.cli.pages import PAGES_OF_COMMANDS, PAGES_OF_KEYS, page_for
from moe_llm.cli.registry import build_parser
from moe_llm.config import Config

ROOT = Path(__file__).parents[1]
QUICKSTART = str(ROOT / "configs/quickstart.yaml")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_page_exists_and_belongs_to_something():
    pages = {*PAGES_OF_KEYS.values(), *PAGES_OF_COMMANDS.values()}
    assert [page for page in pages if not (ROOT / "docs" / page).is_file()] == []
    assert {key.partition(".")[0] for key in PAGES_OF_KEYS} <= set(Config.model_fields)
    assert set(PAGES_OF_COMMANDS) <= set(build_parser().commands)


@pytest.mark.parametrize(
    ("sentence", "command", "page"),
    [
        ("parallel.zero_stage=4 is not one of 1, 2, 3", "train", "guides/several-ranks.md"),
        ("model.router.type=swich is unknown", "train", "guides/routers.md"),
        ("optim.lr=0 is out of range, and data.x=1 too", "train", "guides/optimizers.md"),
        ("output 'x' exists already", "merge", "guides/merging.md"),
    ],
)
def test_the_first_key_decides_and_else_the_command(sentence, command, page):
    assert page_for(sentence, command) == f"docs/{page}"


def test_words_that_only_look_like_keys_lead_nowhere():
    assert page_for("the text has no model. Give another", "generate") is None
    assert page_for("file my.data=x", "generate") is None


def test_a_terminal_sees_the_page_and_a_log_one_line(capsys):
    argv = ["params", QUICKSTART, "parallel.zero_stage=7"]
    with contextlib.redirect_stderr(Terminal()) as stderr:
        assert cli.main(argv) == 2
    first, second = stderr.getvalue().splitlines()
    assert "parallel.zero_stage" in first
    assert second.endswith("see docs/guides/several-ranks.md")
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == f"{first}\n"
