"""The tutorials run from beginning to end, at toy size, and show what they promise."""

import logging
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TUTORIALS = ROOT / "docs/tutorials"


@pytest.fixture
def tutorial(tmp_path, monkeypatch, capsys):
    """Runs one as a user would from the root of a clone, in this process; returns what it prints."""

    def run(name: str) -> str:
        shutil.copytree(ROOT / "configs", tmp_path / "configs")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MOE_LLM_TUTORIAL", "toy")
        monkeypatch.setattr(sys, "argv", [name])
        level = logging.getLogger("moe_llm").level
        runpy.run_path(str(TUTORIALS / f"{name}.py"), run_name="__main__")
        logging.getLogger("moe_llm").setLevel(level)
        return capsys.readouterr().out

    return run


def test_from_text_to_a_mixture_and_its_report(tutorial, tmp_path):
    out = tutorial("text_to_mixture")
    assert "4 experts, 2 of them for each token" in out
    assert "bits per byte of this tutorial: " in out
    assert "MixtralForCausalLM" in out
    assert (tmp_path / "runs/tutorial/mixture/report.html").is_file()


def test_from_a_dense_model_to_a_mixture_with_experts_of_its_own_data(tutorial, tmp_path):
    out = tutorial("dense_to_mixture")
    assert "dense model: loss " in out
    assert "8 experts, 2 a token" in out
    assert "sources.png" in out.rpartition("pictures: ")[2]
    assert (tmp_path / "runs/tutorial/upcycled/inspected/inspect.html").is_file()


def test_experts_of_a_published_mixture_are_trained_and_served(tutorial):
    out = tutorial("finetune_published")
    assert "only the experts have changed" in out
    assert "answer of the server: def" in out


def test_every_script_has_a_test():
    source = Path(__file__).read_text(encoding="utf-8")
    assert [path.stem for path in TUTORIALS.glob("*.py") if f'tutorial("{path.stem}")' not in source] == []
