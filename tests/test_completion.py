"""`moe-llm completion`: the shell completes commands, options and paths."""

import shutil
import subprocess

import pytest

from moe_llm import cli
from moe_llm.cli.registry import build_parser
from moe_llm.cli.shell import SHELLS


def script(shell: str, capsys) -> str:
    assert cli.main(["completion", shell]) == 0
    return capsys.readouterr().out


def completions(script: str, *words: str) -> list[str]:
    """Of the last word, as bash finds them."""
    code = f'{script}\nCOMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}\n_shtab_moe_llm\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_options_and_choices(capsys):
    text = script("bash", capsys)
    assert completions(text, "moe-llm", "eval") == ["evaluate"]
    assert completions(text, "moe-llm", "evaluate", "--max") == ["--max-blocks"]
    assert completions(text, "moe-llm", "config", "sch") == ["schema"]
    assert completions(text, "moe-llm", "plan", "--gpu", "b2") == ["b200"]


def test_bash_completes_paths(capsys, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert completions(script("bash", capsys), "moe-llm", "train", "ru") == ["run.yaml"]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_every_command(shell, capsys):
    text = script(shell, capsys)
    assert [name for name in build_parser().commands if name not in text] == []
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_an_unknown_shell_is_refused(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["completion", "dos"])
    assert done.value.code == 2
    assert "invalid choice: 'dos'" in capsys.readouterr().err
