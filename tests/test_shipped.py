"""An installed package has its configurations with it: quickstart, config list and config copy need no clone."""

import sys
import types
from pathlib import Path

import pytest
import yaml

from moe_llm.cli import main
from moe_llm.cli.shipped import find, shipped
from moe_llm.errors import UserError

ROOT = Path(__file__).parents[1]


def test_every_configuration_of_the_clone_is_shipped():
    assert set(shipped()) == {
        path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")
    }


def test_no_loss_of_the_routers_acts_where_they_stay_as_they_are():
    seen = set()
    for path in (ROOT / "configs/finetune").glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        if "finetune" in content:
            seen.add(path.stem)
            losses = [content["model"][f"router_{name}_loss_coef"] for name in ("aux", "z")]
            assert losses == [0.0, 0.0], path
    assert {"experts_only", "lora", "qwen3_30b_a3b"} <= seen


def test_list_names_them_and_copy_writes_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["config", "list"]) == 0
    assert "routing/top_p.yaml" in capsys.readouterr().out.splitlines()
    assert main(["config", "copy", "routing/top_p"]) == 0
    assert (tmp_path / "top_p.yaml").read_bytes() == (ROOT / "configs/routing/top_p.yaml").read_bytes()
    assert main(["config", "copy", "routing/top_p"]) == 2
    assert "top_p.yaml exists" in capsys.readouterr().err


def test_a_mistyped_name_is_answered_with_the_nearest():
    for name, meant in {
        "quikstart": "quickstart",
        "quikstart.yaml": "quickstart",
        "routng/top-p": "routing/top_p",
        "top_p": "routing/top_p",
    }.items():
        with pytest.raises(UserError, match=rf"did you mean {meant}\?$"):
            find(name)


@pytest.mark.parametrize("name", ["routing/nope", "nope/em", "finetune/zzz.yaml"])
def test_a_name_that_is_near_to_none_is_answered_with_the_list(name):
    with pytest.raises(UserError, match=r"is shipped: moe-llm config list names those that are$"):
        find(name)


def test_quickstart_trains_the_shipped_file_with_overrides(monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "moe_llm.train.run", types.SimpleNamespace(train=seen.append))
    assert main(["quickstart", "train.max_steps=3", "run.dir=elsewhere"]) == 0
    [config] = seen
    assert (config.max_steps, config.run.dir, config.data.sources[0].type) == (3, "elsewhere", "python_stdlib")
