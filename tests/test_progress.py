"""Bars of progress: on a terminal, by rank 0, unless `--quiet` is given, and never in what a command prints."""

import contextlib
import io
import logging
from collections.abc import Iterator

import pytest
import yaml

from moe_llm import cli, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("RANK", raising=False)
    yield
    progress.be_quiet(False)
    logging.getLogger("moe_llm").setLevel(logging.INFO)


@contextlib.contextmanager
def terminal(kind: type[io.StringIO] = Terminal) -> Iterator[io.StringIO]:
    """As stderr: pytest puts its own one back between a fixture and its test."""
    with contextlib.redirect_stderr(kind()) as stderr:
        yield stderr


def test_a_bar_counts_what_is_done_and_disappears():
    with terminal() as stderr:
        assert list(progress.tracked([1, 2, 3], "counting [sheep]")) == [1, 2, 3]
    shown = stderr.getvalue()
    assert "counting [sheep]" in shown
    assert "3/3" in shown
    assert shown.endswith("\x1b[2K")  # the line is erased


def test_bars_may_be_shown_inside_another():
    with terminal() as stderr, progress.progress("outer"), progress.progress("inner", 10, in_bytes=True) as advance:
        advance(10)
    assert "outer" in stderr.getvalue()
    assert "inner" in stderr.getvalue()


def test_what_is_printed_during_a_bar_goes_to_the_output_and_not_to_the_terminal(capsys):
    with terminal() as stderr, progress.progress("working"):
        print("a result")
    assert capsys.readouterr().out == "a result\n"
    assert "a result" not in stderr.getvalue()


@pytest.mark.parametrize("why", ["quiet", "rank", "no terminal"])
def test_no_bar(why, monkeypatch):
    progress.be_quiet(why == "quiet")
    monkeypatch.setenv("RANK", "1" if why == "rank" else "0")
    with terminal(io.StringIO if why == "no terminal" else Terminal) as stderr:
        assert list(progress.tracked("ab", "counting")) == ["a", "b"]
    assert stderr.getvalue() == ""


@pytest.fixture(scope="module")
def checkpoint(finished_run) -> str:
    return str(finished_run / "checkpoints/latest")


def commands(checkpoint: str, text: str, out) -> dict[str, tuple[list[str], str]]:
    recipe = out / "recipe.yaml"
    paths = [checkpoint, checkpoint.replace("latest", "step-00000003")]
    models = [{"model": path, "parameters": {"weight": 1.0}} for path in paths]
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "float32"}))
    return {
        "verify": (["verify", checkpoint], "hashing"),
        "diff": (["diff", checkpoint, checkpoint], "comparing"),
        "merge": (["merge", str(recipe), str(out / "merged")], "merging"),
        "evaluate": (["evaluate", checkpoint, "--data", text, "--max-blocks", "2"], "evaluating"),
        "inspect": (["inspect", checkpoint, "--data", text, "--max-tokens", "64"], "removing each expert"),
        "generate": (["generate", checkpoint, "--prompt", "a", "--max-new-tokens", "2"], "generating"),
    }


@pytest.mark.parametrize("command", ["verify", "diff", "merge", "evaluate", "inspect", "generate"])
def test_commands_show_progress_and_none_with_quiet(command, checkpoint, corpus, tmp_path, capsys):
    argv, expected = commands(checkpoint, str(corpus), tmp_path)[command]
    with terminal() as stderr:
        assert cli.main([*argv, "--quiet"]) == 0
    assert stderr.getvalue() == ""
    printed = capsys.readouterr().out
    if command == "merge":
        argv[-1] += "-again"
    with terminal() as stderr:
        assert cli.main(argv) == 0
    assert expected in stderr.getvalue()
    if command != "merge":
        assert capsys.readouterr().out == printed


def test_a_quiet_run_prints_its_results_alone(make_config, capsys):
    path = make_config(train={"max_steps": 1}, checkpoint={"every_steps": 1})
    assert cli.main(["train", str(path), "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert "checkpoint: " in out
    assert "step 1/1" not in out + err
    assert err == ""
