"""Messages on stderr: in one style, by rank 0 but for those that concern every rank."""

import logging
import subprocess
import sys

import pytest

from moe_llm import logs

SCRIPT = """
import logging
from moe_llm.logs import ON_EVERY_RANK, show_messages
logging.getLogger().addHandler(logging.NullHandler()) if {other} else None
show_messages(command={command})
show_messages(command={command})
logger = logging.getLogger("moe_llm.somewhere")
logger.debug("a detail")
logger.info("a note")
logger.warning("a warning")
logger.warning("a wait", **ON_EVERY_RANK)
logger.error("an error")
"""


def shown(rank: str, command: bool = True, other: bool = False) -> list[str]:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(command=command, other=other)],
        env={"RANK": rank},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == ""
    return result.stderr.splitlines()


def test_rank_0_shows_notes_warnings_and_errors_once_and_no_details():
    assert shown("0") == ["a note", "a warning", "moe-llm: rank 0: a wait", "moe-llm: error: an error"]


def test_other_ranks_show_errors_and_what_concerns_every_rank():
    assert shown("3") == ["moe-llm: rank 3: a wait", "moe-llm: error: an error"]


@pytest.mark.parametrize("command", [True, False])
def test_a_program_with_a_handler_of_its_own_keeps_to_it(command):
    assert bool(shown("0", command=command, other=True)) == command


def test_messages_go_to_the_stderr_of_the_moment(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    logs.show_messages(command=True)
    logging.getLogger("moe_llm.somewhere").info("a note")
    assert capsys.readouterr().err == "a note\n"
