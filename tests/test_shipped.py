"""An installed package has its configurations with it: quickstart, config list and config copy need no clone."""

import sys
import types
from pathlib import Path

import pytest

from moe_llm.cli import main
from moe_llm.cli.shipped import find, shipped
from moe_llm.errors import UserError

ROOT = Path(__file__).parents[1]


def test_every_configuration_of_the_clone_is_shipped():
    assert set(shipped()) == {
        path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")
    }


def test_list_names_them_and_copy_writes_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["config", "list"]) == 0
    assert "routing/top_p.yaml" in capsys.readouterr().out.splitlines()
    assert main(["config", "copy", "routing/top_p"]) == 0
    assert (tmp_path / "top_p.yaml").read_bytes() == (ROOT / "configs/routing/top_p.yaml").read_bytes()
    assert main(["config", "copy", "routing/top_p"]) == 2
    assert "top_p.yaml exists" in capsys.readouterr().err


def test_a_mistyped_name_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean quickstart"):
        find("quikstart")


def test_quickstart_trains_the_shipped_file_with_overrides(monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "moe_llm.train.run", types.SimpleNamespace(train=seen.append))
    assert main(["quickstart", "train.max_steps=3", "run.dir=elsewhere"]) == 0
    [config] = seen
    assert (config.max_steps, config.run.dir, config.data.sources[0].type) == (3, "elsewhere", "python_stdlib")
